// One bound on the bytes that all tables of a server hold in memory, dealt to them by use.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "embedding/embedding_table.h"

namespace hearth {

// Every table may have what the others leave free, so rows come in by use as long as there is room. Where there is
// none, a table begins to let rows leave when what is free is less than a share of what it has: small tables stay
// whole, the large ones share what is left, more of it to those that read more bytes of cold rows a step. Decides which
// tier rows are in, and so never a value. One thread, the tables'.
class MemoryBudget {
 public:
  // Of tables that outlive it.
  MemoryBudget(uint64_t bytes_max, std::vector<EmbeddingTable*> tables);

  // How many rows a table of row_bytes can have at all within bytes_max.
  static uint64_t RowsWithin(uint64_t bytes_max, uint64_t row_bytes);
  // Sets each table's bound anew, and unless a cut is under way has tables give memory back where all is used. Costs
  // little: call it whenever rows may have come.
  absl::Status Deal(bool may_give_back);

 private:
  struct Share {
    EmbeddingTable* table;
    uint64_t misses = 0;    // as stats() had them
    double cold_bytes = 0;  // read a deal, of late
  };

  const uint64_t bytes_max_;
  std::vector<Share> shares_;
};

}  // namespace hearth
