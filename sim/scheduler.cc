// See scheduler.h. Stacks come from Boost.Context, guarded by a page that cannot be touched; the
// sanitizers are told of every switch, because they follow one stack a thread otherwise.
#include "sim/scheduler.h"

#include <cxxabi.h>

#include <algorithm>
#include <boost/context/fiber.hpp>
#include <boost/context/protected_fixedsize_stack.hpp>
#include <limits>

#include "core/check.h"
#include "core/mutant.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace isoshard::sim {
namespace {

// One switch from a stack to another, as the sanitizers want to hear of it.
class Switch {
 public:
  // To a stack of `size` bytes that begins at `bottom`; `last`: nobody will come back here.
  static void leave(void** fake, const void* bottom, size_t size, [[maybe_unused]] void* fibre) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, bottom, size);
#else
    (void)fake, (void)bottom, (void)size;
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fibre, 0);
#endif
  }
  static void arrive(void* fake, const void** bottom, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, bottom, size);
#else
    (void)fake, (void)bottom, (void)size;
#endif
  }
};

// What the C++ run time keeps a thread of exceptions that are being thrown or handled (Itanium ABI,
// __cxa_eh_globals). Each stack has its own, so that a task may wait inside a handler.
struct ExceptionState {
  void* caught = nullptr;
  unsigned int uncaught = 0;

  static void exchange(ExceptionState* other) {
    auto* own = reinterpret_cast<ExceptionState*>(abi::__cxa_get_globals());
    std::swap(*own, *other);
  }
};

}  // namespace

struct Scheduler::Task {
  std::function<void()> body;
  boost::context::fiber own;     // of a task that does not run
  boost::context::fiber caller;  // of the one that runs: the scheduler's side
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  const void* caller_bottom = nullptr;
  size_t caller_size = 0;
  void* fake_stack = nullptr;
  ExceptionState exceptions;  // of the side that does not run
  void* thread_fibre = nullptr;
  void* caller_fibre = nullptr;
  double eagerness = 1.0;
  bool ready = false, ended = false;
  std::exception_ptr failure;

  ~Task() {
#if defined(__SANITIZE_THREAD__)
    if (thread_fibre != nullptr) __tsan_destroy_fiber(thread_fibre);
#endif
  }
};

Scheduler::Scheduler(uint64_t seed, size_t stack_bytes)
    : random_(mix(seed)), stack_bytes_(stack_bytes) {}

Scheduler::~Scheduler() { stop(); }

int Scheduler::spawn(std::function<void()> body) {
  const int number = static_cast<int>(tasks_.size());
  auto task = std::make_unique<Task>();
  task->body = std::move(body);
  Task* const self = task.get();
  boost::context::protected_fixedsize_stack allocator(stack_bytes_);
  const boost::context::stack_context stack = allocator.allocate();
  task->stack_size = stack.size;
  task->stack_bottom = static_cast<std::byte*>(stack.sp) - stack.size;
#if defined(__SANITIZE_ADDRESS__)
  // A stack that lay here before may have left marks: its first frames never return.
  __asan_unpoison_memory_region(task->stack_bottom, task->stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  task->thread_fibre = __tsan_create_fiber(0);
#endif
  task->own = boost::context::fiber(
      std::allocator_arg, boost::context::preallocated(stack.sp, stack.size, stack), allocator,
      [this, self, number](boost::context::fiber&& caller) {
        Switch::arrive(nullptr, &self->caller_bottom, &self->caller_size);
        self->caller = std::move(caller);
        try {
          if (!stopping_) self->body();
        } catch (const TaskStopped&) {
        } catch (const boost::context::detail::forced_unwind&) {
          throw;
        } catch (...) {
          self->failure = std::current_exception();
          failed_.push_back(number);
        }
        self->body = nullptr;
        self->ended = true;
        Switch::leave(nullptr, self->caller_bottom, self->caller_size, self->caller_fibre);
        return std::move(self->caller);
      });
  tasks_.push_back(std::move(task));
  wake(number);
  return number;
}

void Scheduler::wake(int number) {
  Task& task = *tasks_[static_cast<size_t>(number)];
  CHECK(!task.ready && !task.ended, "a task is woken that did not sleep");
  task.ready = true;
  ready_.push_back(number);
}

void Scheduler::resume(int number) {
  Task& task = *tasks_[static_cast<size_t>(number)];
  current_ = number;
  void* fake = nullptr;
#if defined(__SANITIZE_THREAD__)
  task.caller_fibre = __tsan_get_current_fiber();
#endif
  ExceptionState::exchange(&task.exceptions);
  Switch::leave(&fake, task.stack_bottom, task.stack_size, task.thread_fibre);
  task.own = std::move(task.own).resume();
  Switch::arrive(fake, nullptr, nullptr);
  ExceptionState::exchange(&task.exceptions);
  current_ = -1;
}

bool Scheduler::run() {
  for (end_due_pauses(); !ready_.empty(); end_due_pauses()) {
    const size_t pick = static_cast<size_t>(random_.below(static_cast<int64_t>(ready_.size())));
    const int number = ready_[pick];
    Task& task = *tasks_[static_cast<size_t>(number)];
    ++tick_;
    const double drawn = static_cast<double>(random_.next() >> 11) * 0x1p-53;
    if (ready_.size() > 1 && drawn >= task.eagerness) continue;
    ready_[pick] = ready_.back();
    ready_.pop_back();
    task.ready = false;
    resume(number);
  }
  return std::all_of(tasks_.begin(), tasks_.end(), [](const auto& task) { return task->ended; });
}

void Scheduler::stop() {
  CHECK(current_ < 0, "a task cannot stop the others");
  stopping_ = true;
  for (size_t i = 0; i < tasks_.size(); ++i) {
    // A body that catches everything may come back to block() a few times.
    for (int tries = 0; !tasks_[i]->ended && tries < 1000; ++tries) resume(static_cast<int>(i));
  }
  ready_.clear();
  pauses_.clear();
}

void Scheduler::give_up() {
  Task& task = *tasks_[static_cast<size_t>(current_)];
  Switch::leave(&task.fake_stack, task.caller_bottom, task.caller_size, task.caller_fibre);
  task.caller = std::move(task.caller).resume();
  Switch::arrive(task.fake_stack, &task.caller_bottom, &task.caller_size);
  if (stopping_) throw TaskStopped{};
}

void Scheduler::block() {
  CHECK(current_ >= 0, "only a task can wait");
  if (stopping_) throw TaskStopped{};
  give_up();
}

void Scheduler::pause(int64_t turns) {
  CHECK(current_ >= 0 && turns >= 0, "only a task can wait, and not backwards");
  if (stopping_) throw TaskStopped{};
  constexpr int64_t kLast = std::numeric_limits<int64_t>::max();
  pauses_.push_back({turns > kLast - tick_ ? kLast : tick_ + turns, current_});
  give_up();
}

void Scheduler::end_pause(int task) {
  if (std::erase_if(pauses_, [&](const Pause& p) { return p.task == task; }) > 0) wake(task);
}

void Scheduler::end_due_pauses() {
  for (size_t i = 0; i < pauses_.size();) {
    if (pauses_[i].due > tick_)
      ++i;
    else
      end_pause(pauses_[i].task);
  }
  if (!ready_.empty() || pauses_.empty() || mutant("nobody_wakes_the_paused")) return;
  end_pause(std::ranges::min_element(pauses_, {}, &Pause::due)->task);
}

bool Scheduler::ended(int task) const { return tasks_[static_cast<size_t>(task)]->ended; }

std::exception_ptr Scheduler::failure(int task) const {
  return tasks_[static_cast<size_t>(task)]->failure;
}

void Scheduler::set_eagerness(int task, double probability) {
  CHECK(probability > 0 && probability <= 1, "not a probability that lets the task go on");
  tasks_[static_cast<size_t>(task)]->eagerness = probability;
}

}  // namespace isoshard::sim
