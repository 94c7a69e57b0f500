// features.json: how a raw record becomes the graph's input, said so that a stranger can do it.
#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/artifact/bundle.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/job/config.h"
#include "embedding/sign.h"
#include "model/batch/batch.h"
#include "model/export/export.h"
#include "model/export/export_manifest.h"

namespace hearth {
namespace {

using Json = nlohmann::ordered_json;

template <typename Repeated>
Json ListOf(const Repeated& values) {
  Json list = Json::array();
  for (const auto& value : values) list.push_back(value);
  return list;
}

Json TextsOf(const google::protobuf::RepeatedPtrField<std::string>& texts) {
  Json list = Json::array();
  for (const std::string& text : texts) list.push_back(TextJson(text));
  return list;
}

std::string FileOfSideTable(const SideTable& table) { return "side_tables/" + ExportTableFolder(table.name()); }

Json SlotJson(const Job& job, const FeatureLayout& layout, int index) {
  const Slot& slot = job.slot(index);
  const FeatureLayout::SlotPlace& place = layout.slots[index];
  const TableNumber table = static_cast<TableNumber>(place.table) + 1;
  const uint64_t salt = slot.hash() == Slot::SALTED ? SaltOf(SaltText(slot)) : 0;
  Json json;
  json["slot"] = slot.name();
  json["table"] = slot.table();
  json["table_number"] = table;
  json["offset"] = place.offset;
  json["dim"] = place.dim;
  json["pooling"] = slot.pooling() == Slot::MEAN ? "mean" : "sum";
  json["kind"] = Slot::Kind_Name(slot.kind());
  if (slot.value().empty()) {
    json["column"] = TextJson(slot.column().empty() ? slot.name() : slot.column());
  } else {
    json["value"] = TextJson(slot.value());
  }
  json["hash"] = Slot::Hash_Name(slot.hash());
  if (slot.hash() != Slot::RAW) json["seed"] = salt;
  json["missing"] = Slot::Missing_Name(slot.missing());
  json["missing_sign"] = MakeSign(table, slot.hash() == Slot::RAW ? kIdMask : HashId("", salt));
  json["missing_value"] = TextsOf(slot.missing_value());
  if (slot.kind() == Slot::LIST) {
    json["separator"] = TextJson(slot.separator().empty() ? "," : slot.separator().substr(0, 1));
    json["values_max"] = slot.values_max();
  }
  if (slot.kind() == Slot::BUCKET) json["boundary"] = ListOf(slot.boundary());
  return json;
}

Json DenseJson(const DenseFeature& dense, int offset) {
  return {{"name", dense.name()},
          {"offset", offset},
          {"dim", 1},
          {"value", TextJson(dense.value().empty() ? absl::StrCat("`", dense.name(), "`") : dense.value())},
          {"transform", DenseFeature::Transform_Name(dense.transform())},
          {"mean", dense.mean()},
          {"deviation", dense.deviation()},
          {"missing", dense.missing()}};
}

Json LogJson(const Log& log, const std::string& name, const std::string& use) {
  return {{"name", name},
          {"use", use},
          {"format", Log::Format_Name(log.format())},
          {"delimiter", TextJson(log.delimiter() == "\\t" ? "\t" : log.delimiter())},
          {"header", log.header()},
          {"column", TextsOf(log.column())},
          {"multiline_records", log.multiline_records()},
          {"join", ListOf(log.join())},
          {"where", TextJson(log.where())},
          {"known_task", ListOf(log.known_task())},
          {"absent_column", TextsOf(log.absent_column())}};
}

// The rules that the fields do not say by themselves; the words are those of job.proto and docs/FORMATS.md.
Json Rules() {
  return {
      {"sign",
       "table_number << 52 | id, an unsigned 64-bit number; the key of a row as int64 has the same bits. A sign that "
       "its "
       "table does not hold reads as zeros."},
      {"SALTED",
       "id = XXH3-64(text, seed) & (2^52 - 1); seed = XXH3-64(slot.salt or else the slot's name, seed 0), given in the "
       "slot"},
      {"HASHED", "id = XXH3-64(text, seed 0) & (2^52 - 1)"},
      {"text",
       "a string; {\"base64\": …} where its bytes are no UTF-8. Texts are compared, hashed and split as bytes."},
      {"record",
       "ends at a newline, or at a carriage return and a newline; an empty one is none. With multiline_records a "
       "newline "
       "inside quotes belongs to it. More than record_bytes_max bytes, a quote that nobody closes, text behind a "
       "closing "
       "quote, or another number of fields than the header: rejected, and without multiline_records the records too "
       "that "
       "lie in the quoted field, up to 64. A quote counts at a field's start alone; inside, two are one. A byte order "
       "mark "
       "before the first record is no part of it; the header once more is rejected."},
      {"JSON_LINES",
       "a record is a line that holds one object of JSON, its numbers within 64 bits or a finite double, its texts "
       "UTF-8; "
       "another is rejected. A column is a path: user.id is the value of key id in the object at key user, or of a key "
       "user.id; of a key that comes twice the later one holds. A name that begins with a joined side table's name and "
       "a "
       "point is that table's. The column's text: a string as it is, a number as an id is written (whole reals below "
       "2^53 without a point, others in their shortest form), true 1, false 0, null and what is not there empty. Of an "
       "array each element's text with U+001E before it, and LIST splits there; an array elsewhere, of arrays or "
       "objects, "
       "or with that character in a text, and an object: rejected."},
      {"number",
       "what Python's float reads, and no more: white space around it, a sign, digits, a point, an exponent; too small "
       "for "
       "a double is 0. Digits alone are an integer, exact from -2^63 to 2^64 - 1. Anything else is missing: empty, "
       "nan, "
       "inf, what is too large for a double, 1_0, other texts. docs/EXPRESSIONS.md has the rules whole."},
      {"RAW",
       "id = the whole number, however it is written (7, 7.0), 0 to 2^52 - 2; a record with another text there is "
       "rejected"},
      {"missing",
       "a column is missing where it is empty, absent, of a side table without the key, or equal to one of "
       "missing_value; a number also where it is none or not finite. OWN_ROW: the one sign missing_sign. "
       "ZEROS: no sign."},
      {"LIST",
       "the text split at separator; missing parts are dropped; the first values_max others count; none left: missing"},
      {"BUCKET",
       "with boundary: the number of boundaries <= x; without: floor(log2(1 + |x|)), negative where x < 0. The "
       "bucket's "
       "decimal text is hashed; with RAW the bucket is the id."},
      {"value",
       "an expression; as an id (kind ID) an integer is its decimal digits, a whole real below 2^53 too, another real "
       "the "
       "shortest text that reads back as the double (std::to_chars)"},
      {"pooling",
       "columns offset to offset + dim - 1: the sum (mean: divided by their number) of the rows of the slot's signs; "
       "zeros without signs"},
      {"dense",
       "one column each; NONE: x; LOG1P: sign(x) log(1 + |x|); STANDARD: (x - mean) / deviation; missing where that is "
       "no finite float32"},
      {"column",
       "a log's own column; else that of a joined side table, also written table.column. Side tables join by key; an "
       "empty key joins nothing."},
      {"label",
       "positive where the expression is not 0; unknown where it is missing, where mask is 0 or missing, and for "
       "tasks outside a log's known_task (where that is not empty)"},
      {"expression",
       "or := and (|| and)*; and := comparison (&& comparison)*; comparison := sum [(== != < <= > >=) sum]; sum := "
       "product ((+ -) product)*; product := unary ((* / %) unary)*; unary := (! -) unary | atom; atom: number, "
       "'string', column or `column`, (…), min max abs log1p floor if(c,a,b) missing(column). A column is text "
       "beside a string, else a number. Integers stay integers under + - * % and a / that leaves nothing over; "
       "comparisons are exact. What is computed from or compared with what is missing is missing; && and || where "
       "neither side decides alone; as a condition missing is false."}};
}

}  // namespace

absl::Status ExportFeatures(const ExportSource& source, const std::string& folder) {
  const Job& job = source.job;
  const FeatureLayout layout = MakeFeatureLayout(job);
  Json json;
  json["schema"] = 1;
  json["model"] = ExportModelName(job);
  json["train_step"] = source.manifest.step();
  json["width"] = layout.width;
  json["record_bytes_max"] = job.limits().record_bytes_max();
  json["slots"] = Json::array();
  for (int i = 0; i < job.slot_size(); ++i) json["slots"].push_back(SlotJson(job, layout, i));
  json["dense"] = Json::array();
  for (int i = 0; i < job.dense_size(); ++i) {
    json["dense"].push_back(DenseJson(job.dense(i), layout.dense_offset + i));
  }
  json["tasks"] = Json::array();
  for (const Task& task : job.task()) {
    json["tasks"].push_back({{"name", task.name()},
                             {"output", "p_" + task.name()},
                             {"label", TextJson(task.label())},
                             {"mask", TextJson(task.mask())}});
  }
  json["tables"] = Json::array();
  for (int i = 0; i < job.table_size(); ++i) {
    const std::string& name = job.table(i).name();
    json["tables"].push_back({{"name", name},
                              {"number", i + 1},
                              {"dim", job.table(i).dim()},
                              {"folder", "embeddings/" + ExportTableFolder(name)}});
  }
  json["logs"] = Json::array();
  for (const Split& split : job.split()) json["logs"].push_back(LogJson(split.log(), split.name(), "split"));
  for (const Log& log : job.log()) json["logs"].push_back(LogJson(log, log.name(), "training"));
  json["side_tables"] = Json::array();
  for (const SideTable& table : job.side_table()) {
    const std::string file = FileOfSideTable(table);
    json["side_tables"].push_back({{"name", table.name()},
                                   {"file", file},
                                   {"path", table.path()},
                                   {"key", TextJson(table.key())},
                                   {"log_key", TextJson(table.log_key().empty() ? table.key() : table.log_key())},
                                   {"delimiter", TextJson(table.delimiter() == "\\t" ? "\t" : table.delimiter())}});
  }
  json["rules"] = Rules();
  HEARTH_RETURN_IF_ERROR(WriteFileAtomically(JoinPath(folder, "job.txtpb"), PrintJob(job)));
  return WriteFileAtomically(JoinPath(folder, "features.json"), DumpJson(json) + "\n");
}

absl::Status ExportSideTables(const ExportSource& source, const std::string& folder) {
  for (const SideTable& table : source.job.side_table()) {
    const std::string file = FileOfSideTable(table);
    const absl::Status status = CopyIntoBundle(ResolvePath(source.job, table.path()), JoinPath(folder, file));
    if (absl::IsNotFound(status)) {
      return absl::NotFoundError(absl::StrCat("side_table \"", table.name(), "\": ", std::string(status.message()),
                                              "; put it back, or say where it is with --data-dir"));
    }
    HEARTH_RETURN_IF_ERROR(status);
  }
  return absl::OkStatus();
}

}  // namespace hearth
