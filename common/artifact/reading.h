// What reading counts, and what it could not use as it was meant (control.proto, Ledger and Reading), added up over
// batches, lanes and workers.
#pragma once

#include "common/proto/control.pb.h"

namespace hearth {

void AddLedger(const Ledger& more, Ledger* sum);
// Counts of the same column, side table or task are added; the first example stays. REQUIRES: from is not *into.
void MergeReading(const Reading& from, Reading* into);

}  // namespace hearth
