#include "schedule.h"

#include <algorithm>
#include <deque>

#include "block.h"
#include "happens_before.h"
#include "report.h"
#include "settings.h"
#include "watchdog.h"

namespace emulator {

bool reached(const Ends& ends) {
  return std::all_of(ends.begin(), ends.end(), [](const auto& end) { return end->reached; });
}

namespace {

#if defined(EXECUTOR_THREAD)
// The thread sanitizer is told what an early start may count on, so every order shows a fault.
constexpr bool starts_early = false;
#else
constexpr bool starts_early = true;
#endif

// Each block that has begun and stopped holds stacks and a copy of its shared memory.
constexpr size_t most_stopped_blocks = 24;
constexpr size_t most_stopped_threads = 2048;
// Large grids stop some of their blocks at their trigger, for speed.
constexpr unsigned paused_at_trigger = 4;

std::deque<std::shared_ptr<Launch>> queue;  // in the order of the calls
std::vector<std::shared_ptr<Launch>> past;  // ended, but the host has not caught up
std::vector<std::unique_ptr<Block>> idle;   // those of other launches run or have stopped
size_t stopped_blocks = 0, stopped_threads = 0;

bool is_shuffled() { return settings.seed != 0; }
unsigned pick(size_t count) { return is_shuffled() ? dice_of_case.below(unsigned(count)) : 0; }

bool has_room() {
  return stopped_blocks < most_stopped_blocks && stopped_threads < most_stopped_threads;
}

// Whether a block of it can run now, after or before the launch before has ended.
bool can_run(const Launch& launch) { return reached(launch.before); }
bool can_run_early(const Launch& launch) {
  if (!launch.eager || launch.previous->triggered < launch.previous->blocks()) return false;
  return !launch.paused.empty() || (launch.begun < launch.blocks() && has_room());
}

Launch& choose_launch() {
  static std::vector<Launch*> in_turn, too_soon;
  in_turn.clear();
  too_soon.clear();
  for (const auto& launch : queue) {
    if (can_run(*launch))
      in_turn.push_back(launch.get());
    else if (can_run_early(*launch))
      too_soon.push_back(launch.get());
  }
  const auto& launches = too_soon.empty() ? in_turn : too_soon;
  return *launches[pick(launches.size())];
}

// The host has caught up with everything that has ended.
void catch_up() {
  for (const auto& launch : past) happens_before::host_waited(*launch->end);
  past.clear();
  happens_before::all_past();
}

bool is_only_stream(unsigned stream) {
  const auto is_on_it = [=](const auto& launch) { return launch->stream == stream; };
  return std::all_of(past.begin(), past.end(), is_on_it) &&
         std::all_of(queue.begin(), queue.end(), is_on_it);
}

Block& begin_block(Launch& launch) {
  if (launch.order.empty()) {
    launch.order = dice_of_case.order(int(launch.blocks()), is_shuffled());
    // It comes after all that is past, and so does what the host waits for.
    if (!launch.previous && is_only_stream(launch.stream)) catch_up();
    happens_before::launch_begins(launch);
  }
  if (idle.empty()) idle.push_back(std::make_unique<Block>());
  Block& block = *idle.back().release();
  idle.pop_back();
  block.begin(launch, launch.order[launch.begun++], dice_of_case, !is_shuffled());
  return block;
}

void end_launch(Block& last) {
  Launch& launch = *last.launch;
  if (launch.must_wait && !launch.waited) {
    current_block = &last;  // the report names its kernel
    fail("a kernel that may start early never called cudaGridDependencySynchronize");
  }
  launch.end->reached = true;
  launch.previous = nullptr;
  const auto place = std::find_if(queue.begin(), queue.end(),
                                  [&](const auto& other) { return other.get() == &launch; });
  past.push_back(*place);
  queue.erase(place);
}

void run_one_block() {
  Launch& launch = choose_launch();
  const bool in_turn = can_run(launch);
  if (in_turn && !launch.waiting.empty()) {
    launch.paused.insert(launch.paused.end(), launch.waiting.begin(), launch.waiting.end());
    launch.waiting.clear();
  }
  const bool may_begin = launch.begun < launch.blocks() && (in_turn || has_room());
  // All blocks must have begun before the next launch can.
  const bool begins = may_begin && launch.followed_early && has_room();
  const size_t n = begins ? launch.paused.size() : pick(launch.paused.size() + may_begin);
  Block* block;
  if (n < launch.paused.size()) {
    block = launch.paused[n];
    launch.paused.erase(launch.paused.begin() + ptrdiff_t(n));
    --stopped_blocks;
    stopped_threads -= block->threads.size();
  } else {
    block = &begin_block(launch);
  }
  const Block::Stop stop = block->run();
  if (stop != Block::ended) {
    (stop == Block::waits ? launch.waiting : launch.paused).push_back(block);
    ++stopped_blocks;
    stopped_threads += block->threads.size();
    return;
  }
  idle.emplace_back(block);
  if (++launch.ended == launch.blocks()) end_launch(*block);
}

// Draws which launches start as early as they may in this stretch of the queue: none, half or all.
void begin_stretch() {
  const unsigned halves = starts_early && is_shuffled() ? dice_of_case.below(3) : 0;
  for (const auto& launch : queue) {
    if (!launch->previous) continue;
    launch->eager = dice_of_case.below(2) < halves;
    launch->previous->followed_early = launch->eager;
  }
}

}  // namespace

void enqueue(std::shared_ptr<Launch> launch) {
  happens_before::launch_issued(*launch);
  queue.push_back(std::move(launch));
}

bool pauses_after_trigger(const Launch& launch) {
  if (!launch.followed_early || !has_room()) return false;
  const unsigned blocks = unsigned(launch.blocks());
  if (blocks > paused_at_trigger && dice_of_case.below(blocks) >= paused_at_trigger) return false;
  return dice_of_case.below(4) != 0;
}

void synchronize(const Ends& ends) {
  const happens_before::Unseen here;
  begin_stretch();
  while (!reached(ends)) run_one_block();
  stop_watchdog();
  for (const auto& end : ends) happens_before::host_waited(*end);
}

void synchronize_all() {
  const happens_before::Unseen here;
  begin_stretch();
  while (!queue.empty()) run_one_block();
  stop_watchdog();
  catch_up();
}

}  // namespace emulator
