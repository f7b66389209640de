// The program's main: reads cases from standard input and writes their arrays to standard output.
// ../program.py is the other end. All numbers are little-endian.
#include "case.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>

#include "happens_before.h"
#include "report.h"
#include "settings.h"
#include "shared_memory.h"

#if defined(EXECUTOR_ADDRESS)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {
namespace {

std::map<std::string, void (*)(Case&)>& registry() {
  static std::map<std::string, void (*)(Case&)> cases;
  return cases;
}

FILE* replies;

void receive(void* to, size_t bytes) {
  const happens_before::Unseen here;
  if (bytes != 0 && fread(to, 1, bytes, stdin) != bytes) _exit(0);  // Python closed the pipe
}

void reply(const void* from, size_t bytes) { fwrite(from, 1, bytes, replies); }

template <class T>
T receive_number() {
  T value;
  receive(&value, sizeof value);
  return value;
}

std::string receive_string() {
  std::string text(receive_number<uint32_t>(), '\0');
  receive(text.data(), text.size());
  return text;
}

void serve_one() {
  const std::string name = receive_string();
  settings.seed = receive_number<uint64_t>();
  settings.watchdog_seconds = receive_number<double>();
  settings.float_atomics = receive_number<int32_t>() != 0;
  settings.multiprocessors = receive_number<int32_t>();
  dice_of_case = Random(settings.seed);
  Case in;
  for (uint32_t left = receive_number<uint32_t>(); left > 0; --left) {
    const std::string array = receive_string();
    const char kind = receive_number<char>();
    const uint8_t item = receive_number<uint8_t>();
    const uint8_t offset = receive_number<uint8_t>();
    const uint64_t bytes = receive_number<uint64_t>();
    receive(in.add(array, kind, item, offset, bytes).data(), bytes);
  }
  const auto found = registry().find(name);
  if (found == registry().end()) fail("no CUDA_CASE(%s) in this program", name.c_str());
  found->second(in);
  require(cudaDeviceSynchronize());
  const uint32_t count = uint32_t(in.arrays().size());
  reply(&count, sizeof count);
  for (const Array& array : in.arrays()) {
    const uint32_t length = uint32_t(array.name.size());
    reply(&length, sizeof length);
    reply(array.name.data(), length);
    reply(&array.kind, 1);
    reply(&array.item, 1);
    reply(&array.bytes, sizeof array.bytes);
    reply(array.data(), array.bytes);
  }
  fflush(replies);
}

}  // namespace

Registration::Registration(const char* name, void (*run)(Case&)) { registry()[name] = run; }

void case_fault(const std::string& message) { fail("%s", message.c_str()); }

Case::~Case() {
  for (const Array& array : arrays_) {
#if defined(EXECUTOR_ADDRESS)
    __asan_unpoison_memory_region(array.base, array.offset);
#endif
    free(array.base);
  }
}

Array& Case::add(const std::string& name, char kind, uint8_t item, uint8_t offset, uint64_t bytes) {
  const happens_before::Unseen here;
  Array array{name, kind, item, offset, bytes, nullptr};
  void* base = nullptr;
  if (posix_memalign(&base, 256, offset + bytes) != 0) fail("no memory for array %s", name.c_str());
  array.base = static_cast<char*>(base);
  fill_with_junk(base, offset + bytes, dice_of_case);
#if defined(EXECUTOR_ADDRESS)
  __asan_poison_memory_region(array.base, offset);
#endif
  arrays_.push_back(array);
  return arrays_.back();
}

bool Case::has(const char* name) const {
  for (const Array& array : arrays_)
    if (array.name == name) return true;
  return false;
}

const Array& Case::find(const char* name, size_t item) const {
  for (const Array& array : arrays_)
    if (array.name == name) {
      if (item != 0 && array.item != item)
        fail("array %s has items of %d bytes, but the case reads %zu", name, array.item, item);
      return array;
    }
  fail("the case needs an array %s", name);
}

int64_t Case::count(const char* name) const {
  const Array& array = find(name, 0);
  return int64_t(array.bytes / array.item);
}

int64_t Case::integer(const char* name) const {
  const Array& array = find(name, 8);
  if (array.kind != 'i' || array.bytes != 8) fail("%s must be an int", name);
  int64_t value;
  memcpy(&value, array.data(), sizeof value);
  return value;
}

double Case::number(const char* name) const {
  const Array& array = find(name, 8);
  if (array.kind != 'f') return double(integer(name));
  double value;
  memcpy(&value, array.data(), sizeof value);
  return value;
}

}  // namespace emulator

int main() {
  // Standard output belongs to the replies; what kernels print goes to standard error.
  emulator::replies = fdopen(dup(STDOUT_FILENO), "wb");
  dup2(STDERR_FILENO, STDOUT_FILENO);
  setvbuf(stdout, nullptr, _IOLBF, 0);
  for (;;) emulator::serve_one();
}
