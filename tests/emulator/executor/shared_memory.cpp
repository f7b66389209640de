#include "shared_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include "block.h"
#include "report.h"

#if defined(EXECUTOR_ADDRESS)
#include <sanitizer/asan_interface.h>
#endif

extern "C" char cuda_shared_begin[], cuda_shared_end[];  // from shared.ld
// Kernels declare it as `extern __shared__ T dynamic_shared[]`, in the global namespace.
__attribute__((section("cuda_dynamic_shared"),
               aligned(1024))) char dynamic_shared[emulator::shared_capacity];

namespace emulator {
namespace {

// The thread sanitizer takes newly mapped pages for memory that nobody has touched yet, which is
// what shared memory is to a new block.
void forget_accesses(char* begin, size_t bytes) {
#if defined(EXECUTOR_THREAD)
  if (bytes == 0) return;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  bytes = (bytes + page - 1) / page * page;
  if (mmap(begin, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
      begin)
    fail("cannot renew shared memory");
#else
  (void)begin;
  (void)bytes;
#endif
}

Block* owner = nullptr;  // whose contents are in place; null: nobody's any more

size_t static_bytes() { return size_t(cuda_shared_end - cuda_shared_begin); }
size_t lines(size_t bytes) { return (bytes + sizeof(Line) - 1) / sizeof(Line); }

// Both have room for whole lines. Volatile, as in fill_with_junk.
void copy(void* to, const void* from, size_t bytes) {
  volatile Line* destination = static_cast<Line*>(to);
  const volatile Line* source = static_cast<const Line*>(from);
  for (size_t i = 0; i < lines(bytes); ++i) destination[i] = source[i];
}

void put_aside() {
  if (owner == nullptr) return;
  const size_t dynamic_bytes = owner->launch->dynamic_bytes;
  owner->shared_memory.resize(lines(static_bytes()) + lines(dynamic_bytes));
  copy(owner->shared_memory.data(), cuda_shared_begin, static_bytes());
  copy(owner->shared_memory.data() + lines(static_bytes()), dynamic_shared, dynamic_bytes);
  owner = nullptr;
}

void guard_dynamic(size_t dynamic_bytes) {
#if defined(EXECUTOR_ADDRESS)
  __asan_unpoison_memory_region(dynamic_shared, shared_capacity);
  __asan_poison_memory_region(dynamic_shared + dynamic_bytes, shared_capacity - dynamic_bytes);
#else
  (void)dynamic_bytes;
#endif
}

}  // namespace

void fill_with_junk(void* memory, size_t bytes, Random& random) {
  // As float32: tiny, NaN, huge, huge, tiny. As integers: far from zero, but for -1.
  static const unsigned char junk[] = {0xab, 0xff, 0x7e, 0x7f, 0x81};
  const unsigned char byte = junk[random.below(sizeof junk)];
  // Volatile, so that no call to memset results: the sanitizers would check and record it.
  volatile unsigned char* p = static_cast<unsigned char*>(memory);
  size_t i = 0;
  for (; i < bytes && reinterpret_cast<uintptr_t>(p + i) % sizeof(Line) != 0; ++i) p[i] = byte;
  const uint64_t word = byte * 0x0101010101010101u;
  const Line line = {word, word};
  for (; i + sizeof line <= bytes; i += sizeof line)
    *reinterpret_cast<volatile Line*>(p + i) = line;
  for (; i < bytes; ++i) p[i] = byte;
}

void begin_shared_memory(Block& block, Random& random) {
  put_aside();
  const size_t dynamic_bytes = block.launch->dynamic_bytes;
  forget_accesses(cuda_shared_begin, static_bytes());
  fill_with_junk(cuda_shared_begin, static_bytes(), random);
  forget_accesses(dynamic_shared, dynamic_bytes);
  fill_with_junk(dynamic_shared, dynamic_bytes, random);
  guard_dynamic(dynamic_bytes);
  owner = &block;
}

void resume_shared_memory(Block& block) {
  if (owner == &block) return;
  put_aside();
  const size_t dynamic_bytes = block.launch->dynamic_bytes;
  copy(cuda_shared_begin, block.shared_memory.data(), static_bytes());
  copy(dynamic_shared, block.shared_memory.data() + lines(static_bytes()), dynamic_bytes);
  guard_dynamic(dynamic_bytes);
  owner = &block;
}

void end_shared_memory() { owner = nullptr; }

}  // namespace emulator
