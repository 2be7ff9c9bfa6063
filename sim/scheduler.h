// Tasks that take turns on one thread, each with a stack of its own. Which of those that can go on
// goes next is drawn from a seed, so a run can be had again to the letter. A task gives up its turn
// only in block() and pause(); there are no clocks, and time is counted in turns.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "core/random.h"

namespace isoshard::sim {

// Ends a task from outside: thrown by block() once stop() was called. Not an
// std::exception, so that a body which swallows errors does not swallow this by accident.
struct TaskStopped {};

class Scheduler {
 public:
  explicit Scheduler(uint64_t seed, size_t stack_bytes = 256 * 1024);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // A task that begins at the next run(); returns its number, 0, 1, …
  int spawn(std::function<void()> body);

  // Until every task has ended or none can go on. True: all have ended.
  bool run();
  // Lets every task that has not ended unwind; none is left afterwards.
  void stop();

  // Of the running task: waits until some other task wakes it.
  void block();
  void wake(int task);
  // Of the running task: waits until `turns` more were given, or end_pause() is called, or no task
  // can go on that does not pause; of several the one whose time is nearest goes first.
  void pause(int64_t turns);
  void end_pause(int task);

  // stop() is at work: whoever runs now is to unwind.
  bool stopping() const { return stopping_; }
  int current() const { return current_; }
  int64_t tick() const { return tick_; }  // turns that were given so far
  bool ended(int task) const;
  // What the task threw; null if nothing.
  std::exception_ptr failure(int task) const;
  // Tasks that threw, in the order in which they did.
  const std::vector<int>& failed() const { return failed_; }
  // A task that gets a turn only with this probability when others can go on; 1: as the others.
  void set_eagerness(int task, double probability);

 private:
  struct Task;
  void resume(int task);
  void give_up();
  void end_due_pauses();

  struct Pause {
    int64_t due = 0;  // tick_
    int task = 0;
  };
  Random random_;
  size_t stack_bytes_;
  std::vector<std::unique_ptr<Task>> tasks_;
  std::vector<int> ready_;
  std::vector<Pause> pauses_;  // in the order in which they began
  std::vector<int> failed_;
  int current_ = -1;
  int64_t tick_ = 0;
  bool stopping_ = false;
};

}  // namespace isoshard::sim
