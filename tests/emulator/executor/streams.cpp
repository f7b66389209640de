#include "streams.h"

#include "schedule.h"

struct CUstream_st {
  unsigned number;                           // which no other stream ever has
  emulator::Ends tail;                       // what the next launch comes after
  std::shared_ptr<emulator::Launch> kernel;  // if that is one kernel, and nothing else
};
struct CUevent_st {
  emulator::Ends recorded;
};

namespace emulator {
namespace {

CUstream_st null_stream{};
unsigned streams = 1;

CUstream_st& find(cudaStream_t stream) { return stream == nullptr ? null_stream : *stream; }

void add(std::shared_ptr<Launch> launch, CUstream_st& to) {
  launch->stream = to.number;
  launch->before = to.tail;
  launch->end = std::make_shared<End>();
  to.tail = {launch->end};
  enqueue(std::move(launch));
}

}  // namespace

void append(cudaStream_t stream, std::shared_ptr<Launch> launch) {
  CUstream_st& to = find(stream);
  if (launch->must_wait) launch->previous = to.kernel;
  to.kernel = launch;
  add(std::move(launch), to);
}

void append_work(cudaStream_t stream, const void* name, void (*body)(const void*),
                 std::shared_ptr<const void> closure) {
  CUstream_st& to = find(stream);
  to.kernel = nullptr;
  auto launch = std::make_shared<Launch>();
  launch->kernel = name;
  launch->body = body;
  launch->closure = std::move(closure);
  add(std::move(launch), to);
}

}  // namespace emulator

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = new CUstream_st{emulator::streams++, {}, {}};
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) {
  return cudaStreamCreate(stream);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  emulator::synchronize(emulator::find(stream).tail);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  emulator::synchronize_all();
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int) {
  return cudaEventCreate(event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->recorded = emulator::find(stream).tail;
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  emulator::synchronize(event->recorded);
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int) {
  CUstream_st& to = emulator::find(stream);
  to.tail.insert(to.tail.end(), event->recorded.begin(), event->recorded.end());
  to.kernel = nullptr;
  return cudaSuccess;
}
