#include "common/artifact/reading.h"

namespace hearth {

namespace {

// By name: there are as many as the job names columns and side tables, so few.
Reading::Column* ColumnOf(const std::string& name, Reading* reading) {
  for (Reading::Column& column : *reading->mutable_column()) {
    if (column.name() == name) return &column;
  }
  Reading::Column* const column = reading->add_column();
  column->set_name(name);
  return column;
}

Reading::Join* JoinOf(const std::string& side_table, Reading* reading) {
  for (Reading::Join& join : *reading->mutable_join()) {
    if (join.side_table() == side_table) return &join;
  }
  Reading::Join* const join = reading->add_join();
  join->set_side_table(side_table);
  return join;
}

}  // namespace

void AddLedger(const Ledger& more, Ledger* sum) {
  sum->set_read(sum->read() + more.read());
  sum->set_trained(sum->trained() + more.trained());
  sum->set_rejected(sum->rejected() + more.rejected());
  sum->set_filtered(sum->filtered() + more.filtered());
}

void MergeReading(const Reading& from, Reading* into) {
  for (const Reading::Column& more : from.column()) {
    Reading::Column* const column = ColumnOf(more.name(), into);
    column->set_unreadable(column->unreadable() + more.unreadable());
    if (!column->has_example()) column->set_example(more.example());
  }
  for (const Reading::Join& more : from.join()) {
    Reading::Join* const join = JoinOf(more.side_table(), into);
    join->set_matched(join->matched() + more.matched());
    join->set_unmatched(join->unmatched() + more.unmatched());
    join->set_without_key(join->without_key() + more.without_key());
    if (!join->has_example() && more.has_example()) join->set_example(more.example());
  }
  for (int i = 0; i < from.task_size(); ++i) {
    Reading::Task* const task = i < into->task_size() ? into->mutable_task(i) : into->add_task();
    task->set_positives(task->positives() + from.task(i).positives());
    task->set_negatives(task->negatives() + from.task(i).negatives());
    task->set_masked(task->masked() + from.task(i).masked());
  }
}

}  // namespace hearth
