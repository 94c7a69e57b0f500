#include "model/export/export_delta.h"

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <queue>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/artifact/bundle.h"
#include "common/artifact/bundle_chain.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "common/job/identity.h"
#include "embedding/row_record.h"
#include "embedding/snapshot_reader.h"
#include "model/export/export.h"
#include "model/export/export_manifest.h"
#include "model/export/export_rows.h"

namespace hearth {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kDeletedFile = "deleted";

std::string TableFolder(const Table& table) { return "embeddings/" + ExportTableFolder(table.name()); }

// The rows of one table that a full export and the deltas on it hold together, in (logical shard, sign) order: of each
// sign the newest delta's word counts.
class TableMerge {
 public:
  // `folders`: of the full export, then of the deltas. Without weights only keys are read.
  absl::Status Open(const std::vector<BundleLink>& chain, const Table& table, uint32_t shards, bool with_weights);
  // The first row, then the next one.
  absl::Status Next();
  bool valid() const { return at_ != nullptr; }
  Sign sign() const { return at_->key.sign; }
  KvKey key() const { return at_->key; }
  absl::Span<const float> weights() const { return at_->weights; }

 private:
  struct Part {  // one file of keys, with or without their weights
    size_t link = 0;
    bool deletes = false;
    InFile keys, values;
    uint64_t left = 0;
    std::optional<KvKey> last;
    KvKey key;
    std::vector<float> weights;  // [dim], or none
  };
  struct Later {
    bool operator()(const Part* a, const Part* b) const {
      return a->key == b->key ? a->link < b->link : b->key < a->key;
    }
  };
  absl::Status Add(size_t link, const std::string& folder, bool deletes, uint32_t dim);
  absl::Status Advance(Part* part);

  uint32_t shards_ = 1;
  std::vector<std::unique_ptr<Part>> parts_;
  std::priority_queue<Part*, std::vector<Part*>, Later> heads_;
  std::vector<Part*> used_;  // stand at the last sign that was looked at
  Part* at_ = nullptr;
};

absl::Status TableMerge::Open(const std::vector<BundleLink>& chain, const Table& table, uint32_t shards,
                              bool with_weights) {
  shards_ = shards;
  for (size_t i = 0; i < chain.size(); ++i) {
    const std::string folder = JoinPath(chain[i].folder, TableFolder(table));
    HEARTH_RETURN_IF_ERROR(Add(i, folder, false, with_weights ? table.dim() : 0));
    if (chain[i].is_delta) HEARTH_RETURN_IF_ERROR(Add(i, folder, true, 0));
  }
  return Next();
}

absl::Status TableMerge::Add(size_t link, const std::string& folder, bool deletes, uint32_t dim) {
  const bool hps = deletes || PathExists(JoinPath(folder, "key"));
  const size_t header_bytes = hps ? 0 : kNpyHeaderBytes;
  auto part = std::make_unique<Part>();
  part->link = link;
  part->deletes = deletes;
  const std::string keys = JoinPath(folder, deletes ? kDeletedFile : hps ? "key" : "keys.npy");
  HEARTH_RETURN_IF_ERROR(part->keys.Open(keys, header_bytes, sizeof(Sign)));
  part->left = part->keys.records();
  if (dim > 0) {
    part->weights.resize(dim);
    const std::string values = JoinPath(folder, hps ? "emb_vector" : "values.npy");
    HEARTH_RETURN_IF_ERROR(part->values.Open(values, header_bytes, dim * sizeof(float)));
    if (part->values.records() != part->left) {
      return absl::DataLossError(
          absl::StrCat(values, ": holds ", part->values.records(), " rows, and there are ", part->left, " keys"));
    }
  }
  parts_.push_back(std::move(part));
  return Advance(parts_.back().get());
}

absl::Status TableMerge::Advance(Part* part) {
  if (part->left == 0) return absl::OkStatus();
  --part->left;
  Sign sign = 0;
  HEARTH_RETURN_IF_ERROR(part->keys.Read(&sign));
  part->key = KeyOf(sign, shards_);
  if (part->last.has_value() && !(*part->last < part->key)) {
    return absl::DataLossError(absl::StrCat(part->keys.path(),
                                            ": keys are not in the order of logical shard and sign (an older build's "
                                            "export is not); export it again"));
  }
  part->last = part->key;
  if (!part->weights.empty()) HEARTH_RETURN_IF_ERROR(part->values.Read(part->weights.data()));
  heads_.push(part);
  return absl::OkStatus();
}

absl::Status TableMerge::Next() {
  at_ = nullptr;
  while (true) {
    for (Part* const part : used_) HEARTH_RETURN_IF_ERROR(Advance(part));
    used_.clear();
    if (heads_.empty()) return absl::OkStatus();
    const KvKey key = heads_.top()->key;
    while (!heads_.empty() && heads_.top()->key == key) {
      used_.push_back(heads_.top());
      heads_.pop();
    }
    if (used_.size() > 1 && used_[0]->link == used_[1]->link) {
      return absl::DataLossError(
          absl::StrCat(used_[0]->keys.path(), ": sign ", key.sign, " is both a row and deleted in one delta"));
    }
    if (!used_[0]->deletes) {
      at_ = used_[0];
      return absl::OkStatus();
    }
  }
}

// Lists one difference of two jobs a line; empty where a model of one is a model of the other.
absl::Status CheckSameJob(const std::string& folder, const Job& job) {
  HEARTH_ASSIGN_OR_RETURN(const Job before, LoadJob(JoinPath(folder, "job.txtpb"), {}));
  // What a run may change on its way it may have changed between the two.
  std::vector<std::string> differences;
  for (const JobChange& change : OfKind(ChangesOf(before, job, Manifest()), JobChange::kRefused)) {
    differences.push_back(change.ToString());
  }
  if (differences.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      folder, ": is of another job, which differs in (there -> here):\n  ", absl::StrJoin(differences, "\n  ")));
}

// --- a delta

struct DeltaTable {
  ExportedTable table;  // as a full export at this step has it
  uint64_t upserts = 0;
  uint64_t deletions = 0;
};

absl::StatusOr<DeltaTable> ExportTable(const ExportSource& source, const std::vector<BundleLink>& chain,
                                       TableNumber number, const std::string& folder, uint64_t* rows_hash) {
  const Table& config = source.job.table(static_cast<int>(number) - 1);
  const uint32_t shards = source.manifest.shards();
  const uint64_t since = chain.back().step;
  TableMerge before;
  HEARTH_RETURN_IF_ERROR(before.Open(chain, config, shards, /*with_weights=*/false));
  ExportFormats rows_alone;
  rows_alone.hps = true;
  TableWriter upserts, all;  // the latter counts and sums
  OutFile deleted;
  const std::string to = JoinPath(folder, TableFolder(config));
  HEARTH_RETURN_IF_ERROR(upserts.Open(rows_alone, to, config.dim()));
  HEARTH_RETURN_IF_ERROR(deleted.Open(JoinPath(to, kDeletedFile)));
  DeltaTable result;
  const auto delete_one = [&]() -> absl::Status {
    ++result.deletions;
    const Sign sign = before.sign();
    HEARTH_RETURN_IF_ERROR(deleted.Write(&sign, sizeof(sign)));
    return before.Next();
  };
  HEARTH_RETURN_IF_ERROR(VisitRows(
      source.folder, source.manifest, source.job, number,
      [&](Sign sign, const RowMeta& meta, absl::Span<const float> weights_and_state) -> absl::Status {
        const absl::Span<const float> weights = weights_and_state.subspan(0, config.dim());
        const KvKey key = KeyOf(sign, shards);
        while (before.valid() && before.key() < key) HEARTH_RETURN_IF_ERROR(delete_one());
        const bool known = before.valid() && before.key() == key;
        if (known) HEARTH_RETURN_IF_ERROR(before.Next());
        HEARTH_RETURN_IF_ERROR(all.Add(sign, weights));
        if (meta.last_step > since) return upserts.Add(sign, weights);
        if (known) return absl::OkStatus();
        return absl::DataLossError(absl::StrCat(
            chain.back().folder, ": its chain lacks sign ", sign, " of table \"", config.name(), "\", which step ",
            meta.last_step, " touched: it is not of ", source.folder, "'s run; make a new full export"));
      },
      rows_hash));
  while (before.valid()) HEARTH_RETURN_IF_ERROR(delete_one());
  HEARTH_RETURN_IF_ERROR(upserts.Close());
  HEARTH_RETURN_IF_ERROR(deleted.Close());
  result.table = {config.name(), config.dim(), all.rows(), all.weights_hash()};
  result.upserts = upserts.rows();
  return result;
}

// The chain's keys decide what is deleted: they must be what was published.
absl::Status CheckKeys(const std::vector<BundleLink>& chain) {
  for (const BundleLink& link : chain) {
    HEARTH_ASSIGN_OR_RETURN(const std::string text, ReadBundleManifest(link.folder));
    HEARTH_ASSIGN_OR_RETURN(const std::vector<BundleFile> files, ListedFiles(link.folder, text));
    for (const BundleFile& file : files) {
      const bool keys = absl::EndsWith(file.path, "/key") || absl::EndsWith(file.path, "/keys.npy") ||
                        absl::EndsWith(file.path, absl::StrCat("/", kDeletedFile));
      if (keys) HEARTH_RETURN_IF_ERROR(CheckBundleFile(link.folder, file));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> FillDelta(const ExportSource& source, const ExportFormats& formats,
                                      const std::vector<BundleLink>& chain, const std::string& folder) {
  HEARTH_RETURN_IF_ERROR(CheckKeys(chain));
  HEARTH_RETURN_IF_ERROR(ExportFeatures(source, folder));
  HEARTH_RETURN_IF_ERROR(ExportDense(source, formats, folder));
  std::vector<ExportedTable> tables;
  std::vector<DeltaTable> changes;
  uint64_t upserts = 0, deletions = 0, rows_hash = 0;
  for (int t = 0; t < source.job.table_size(); ++t) {
    HEARTH_ASSIGN_OR_RETURN(DeltaTable one,
                            ExportTable(source, chain, static_cast<TableNumber>(t) + 1, folder, &rows_hash));
    upserts += one.upserts;
    deletions += one.deletions;
    tables.push_back(one.table);
    changes.push_back(std::move(one));
  }
  HEARTH_RETURN_IF_ERROR(CheckRowsHash(source.folder, source.manifest, rows_hash));
  Json json = ExportManifest(source, formats, tables);
  json["base_version"] = chain[0].step;
  const BundleLink& last = chain.back();
  json["delta"] = {{"seq", last.seq + 1},
                   {"previous_seq", last.seq},
                   {"previous_sha256", last.sha256},
                   {"from_step", last.step},
                   {"to_step", source.manifest.step()}};
  for (size_t t = 0; t < changes.size(); ++t) {
    json["tables"][t]["upserts"] = changes[t].upserts;
    json["tables"][t]["deletions"] = changes[t].deletions;
  }
  HEARTH_RETURN_IF_ERROR(FinishExport(std::move(json), folder).status());
  return absl::StrCat("delta ", last.seq + 1, " on the full export of step ", chain[0].step, ", steps ", last.step + 1,
                      " to ", source.manifest.step(), ", ", upserts, " rows touched, ", deletions, " deleted\n");
}

absl::StatusOr<std::vector<BundleLink>> ChainEndingAt(const std::string& out, uint64_t step) {
  HEARTH_ASSIGN_OR_RETURN(std::vector<BundleLink> chain, ReadNewestChain(out));
  if (chain.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(
        out, ": holds no full export in a folder named by its step; make one first: hearth export SNAPSHOT --out ", out,
        "/STEP"));
  }
  if (chain.back().step != step) {
    return absl::FailedPreconditionError(absl::StrCat(chain.back().folder, ": its chain ends at step ",
                                                      chain.back().step, ", not at ", step, "; give --since ",
                                                      chain.back().step));
  }
  if (chain.size() > kDeltasMax) {
    return absl::FailedPreconditionError(absl::StrCat(chain[0].folder, ": carries ", kDeltasMax,
                                                      " deltas, and no more are allowed; make a new full export"));
  }
  return chain;
}

// --- the merge

absl::Status CopyTree(const std::string& from, const std::string& to) {
  std::error_code error;
  std::filesystem::recursive_directory_iterator at(from, error);
  for (; !error && at != std::filesystem::recursive_directory_iterator(); at.increment(error)) {
    if (at->is_directory()) continue;
    const std::string name = at->path().lexically_relative(from).string();
    HEARTH_RETURN_IF_ERROR(CopyIntoBundle(at->path().string(), JoinPath(to, name)));
  }
  if (error) return absl::UnavailableError(absl::StrCat(from, ": ", error.message()));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<BundleLink>> LinksToApply(const ApplyOptions& options) {
  std::vector<BundleLink> chain(1);
  HEARTH_ASSIGN_OR_RETURN(chain[0], ReadBundleLink(options.base));
  if (chain[0].is_delta) {
    return absl::FailedPreconditionError(
        absl::StrCat(options.base, ": is a delta; first comes a full export, or what --apply made of one"));
  }
  std::vector<std::string> folders = options.deltas;
  if (folders.empty()) {
    std::error_code error;
    const std::filesystem::path base = std::filesystem::absolute(options.base, error).lexically_normal();
    const std::string out = (base.has_filename() ? base : base.parent_path()).parent_path().string();
    HEARTH_ASSIGN_OR_RETURN(const std::vector<uint64_t> seqs, ListDeltas(out, chain[0].base));
    for (const uint64_t seq : seqs) {
      if (seq > chain[0].seq) folders.push_back(JoinPath(DeltasFolder(out, chain[0].base), absl::StrCat(seq)));
    }
  }
  if (folders.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat(options.base, ": no later delta on it lies in ../delta/", chain[0].base, "; name some"));
  }
  if (folders.size() > kDeltasMax) {
    return absl::FailedPreconditionError(absl::StrCat(
        "--apply takes at most ", kDeltasMax, " deltas at once; apply the first ones, then the others to that"));
  }
  for (const std::string& folder : folders) {
    HEARTH_ASSIGN_OR_RETURN(BundleLink link, ReadBundleLink(folder));
    HEARTH_RETURN_IF_ERROR(CheckFollows(chain.back(), link));
    chain.push_back(std::move(link));
  }
  return chain;
}

absl::StatusOr<std::string> FillApplied(const std::vector<BundleLink>& chain, const ExportFormats& formats,
                                        const std::string& folder) {
  const BundleLink& last = chain.back();
  HEARTH_ASSIGN_OR_RETURN(Json json, ReadExportManifest(last.folder));
  HEARTH_ASSIGN_OR_RETURN(const Job job, LoadJob(JoinPath(last.folder, "job.txtpb"), {}));
  for (const char* name : {"job.txtpb", "features.json", "dense.safetensors"}) {
    const std::string from = JoinPath(last.folder, name);
    if (PathExists(from)) HEARTH_RETURN_IF_ERROR(CopyIntoBundle(from, JoinPath(folder, name)));
  }
  for (const auto& [from, name] :
       {std::pair<std::string, const char*>{last.folder, "triton"}, {chain[0].folder, "side_tables"}}) {
    if (PathExists(JoinPath(from, name)))
      HEARTH_RETURN_IF_ERROR(CopyTree(JoinPath(from, name), JoinPath(folder, name)));
  }
  uint64_t rows = 0;
  for (int t = 0; t < job.table_size(); ++t) {
    TableMerge merge;
    TableWriter writer;
    HEARTH_RETURN_IF_ERROR(merge.Open(chain, job.table(t), job.training().shards(), /*with_weights=*/true));
    HEARTH_RETURN_IF_ERROR(writer.Open(formats, JoinPath(folder, TableFolder(job.table(t))), job.table(t).dim()));
    for (; merge.valid();) {
      HEARTH_RETURN_IF_ERROR(writer.Add(merge.sign(), merge.weights()));
      HEARTH_RETURN_IF_ERROR(merge.Next());
    }
    HEARTH_RETURN_IF_ERROR(writer.Close());
    Json& table = json["tables"][static_cast<size_t>(t)];
    const std::string sum = absl::StrFormat("%016x", writer.weights_hash());
    if (table.value("rows", Json()) != writer.rows() || table.value("weights_hash", Json()) != sum) {
      return absl::DataLossError(absl::StrCat(last.folder, ": table \"", job.table(t).name(), "\" should have ",
                                              table.value("rows", Json()).dump(), " rows and weights_hash ",
                                              table.value("weights_hash", Json()).dump(), "; merged it has ",
                                              writer.rows(), " and ", sum, "; start from a newer full export"));
    }
    table.erase("upserts");
    table.erase("deletions");
    rows += writer.rows();
  }
  json.erase("delta");
  json["base_version"] = nullptr;
  json["applied"] = {{"base", last.base}, {"seq", last.seq}, {"sha256", last.sha256}};
  json["parity"] = nullptr;
  json["graph_parity"] = nullptr;
  HEARTH_RETURN_IF_ERROR(FinishExport(std::move(json), folder).status());
  return absl::StrCat("step ", last.step, ", ", rows, " rows, from ", chain.size() - 1, " deltas on step ",
                      chain[0].step, "\n");
}

}  // namespace

absl::StatusOr<std::string> ExportDelta(const DeltaOptions& options) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<BundleLink> chain, ChainEndingAt(options.out, options.since));
  HEARTH_ASSIGN_OR_RETURN(const Json base, ReadExportManifest(chain[0].folder));
  HEARTH_ASSIGN_OR_RETURN(const ExportFormats formats, FormatsOf(base, chain[0].folder));
  if (!formats.hps && !formats.npy) {
    return absl::FailedPreconditionError(
        absl::StrCat(chain[0].folder, ": holds no rows, so nothing can change in them; export it with hps or npy"));
  }
  HEARTH_ASSIGN_OR_RETURN(const ExportSource source, OpenExportSource(options.snapshot, options.data_dir));
  if (source.manifest.step() <= options.since) {
    return absl::FailedPreconditionError(absl::StrCat(source.folder, ": is of step ", source.manifest.step(),
                                                      ", which is not after --since ", options.since));
  }
  HEARTH_RETURN_IF_ERROR(CheckSameJob(chain[0].folder, source.job));
  const std::string out = JoinPath(DeltasFolder(options.out, chain[0].base), absl::StrCat(chain.back().seq + 1));
  std::string report;
  HEARTH_RETURN_IF_ERROR(PublishFolder(out, [&](const std::string& folder) -> absl::Status {
    absl::StatusOr<std::string> filled = FillDelta(source, formats, chain, folder);
    if (!filled.ok()) return source.hold.Explain(filled.status());
    report = *std::move(filled);
    return absl::OkStatus();
  }));
  return absl::StrCat(out, ": ", report);
}

absl::StatusOr<std::string> ApplyDeltas(const ApplyOptions& options) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<BundleLink> chain, LinksToApply(options));
  HEARTH_ASSIGN_OR_RETURN(const Json base, ReadExportManifest(chain[0].folder));
  HEARTH_ASSIGN_OR_RETURN(const ExportFormats formats, FormatsOf(base, chain[0].folder));
  for (const BundleLink& link : chain) HEARTH_RETURN_IF_ERROR(VerifyBundle(link.folder).status());
  HEARTH_ASSIGN_OR_RETURN(const Job job, LoadJob(JoinPath(chain.back().folder, "job.txtpb"), {}));
  HEARTH_RETURN_IF_ERROR(CheckSameJob(chain[0].folder, job));
  std::string report;
  HEARTH_RETURN_IF_ERROR(PublishFolder(options.out, [&](const std::string& folder) -> absl::Status {
    HEARTH_ASSIGN_OR_RETURN(report, FillApplied(chain, formats, folder));
    return absl::OkStatus();
  }));
  return absl::StrCat(options.out, ": ", report);
}

}  // namespace hearth
