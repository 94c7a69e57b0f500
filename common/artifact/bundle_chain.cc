#include "common/artifact/bundle_chain.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/artifact/bundle.h"
#include "common/artifact/numbered_folder.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace hearth {
namespace {

using Json = nlohmann::json;

constexpr size_t kSha256Digits = 64;

bool TakeNumber(const Json& json, const char* field, uint64_t* number) {
  if (!json.contains(field) || !json[field].is_number_unsigned()) return false;
  *number = json[field].get<uint64_t>();
  return true;
}

bool TakeSum(const Json& json, const char* field, std::string* sum) {
  if (!json.contains(field) || !json[field].is_string()) return false;
  *sum = json[field].get<std::string>();
  return sum->size() == kSha256Digits;
}

std::string NameOf(const BundleLink& link) {
  return link.seq == 0 ? absl::StrCat("the full export of step ", link.base)
                       : absl::StrCat("delta ", link.seq, " on the full export of step ", link.base);
}

}  // namespace

absl::StatusOr<BundleLink> ReadBundleLink(const std::string& folder) {
  if (!PathExists(folder)) return absl::NotFoundError(absl::StrCat(folder, ": does not exist"));
  if (!IsBundle(folder)) {
    return absl::FailedPreconditionError(
        absl::StrCat(folder, ": is no export bundle and no delta: it has no ", kBundleManifest));
  }
  HEARTH_ASSIGN_OR_RETURN(const std::string text, ReadBundleManifest(folder));
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  BundleLink link;
  link.folder = folder;
  HEARTH_ASSIGN_OR_RETURN(link.sha256, Sha256OfFile(JoinPath(folder, kBundleManifest)));
  bool whole = json.is_object() && TakeNumber(json, "version", &link.step);
  if (whole && json.contains("delta")) {
    const Json& delta = json["delta"];
    link.is_delta = true;
    whole = delta.is_object() && TakeNumber(json, "base_version", &link.base) && TakeNumber(delta, "seq", &link.seq) &&
            link.seq >= 1 && TakeNumber(delta, "from_step", &link.from_step) && link.from_step < link.step &&
            TakeSum(delta, "previous_sha256", &link.previous_sha256);
  } else if (whole && json.contains("applied")) {
    const Json& applied = json["applied"];
    whole = applied.is_object() && TakeNumber(applied, "base", &link.base) && TakeNumber(applied, "seq", &link.seq) &&
            TakeSum(applied, "sha256", &link.sha256);
  } else {
    link.base = link.step;
  }
  if (!whole) {
    return absl::DataLossError(
        absl::StrCat(JoinPath(folder, kBundleManifest), ": does not say its place in a chain; export it again"));
  }
  return link;
}

absl::Status CheckFollows(const BundleLink& before, const BundleLink& delta) {
  const std::string due = absl::StrCat("; due is delta ", before.seq + 1, " on the full export of step ", before.base,
                                       ", after step ", before.step);
  if (!delta.is_delta) return absl::FailedPreconditionError(absl::StrCat(delta.folder, ": is no delta", due));
  if (delta.base != before.base || delta.seq != before.seq + 1) {
    return absl::FailedPreconditionError(absl::StrCat(delta.folder, ": is ", NameOf(delta), due));
  }
  if (delta.previous_sha256 != before.sha256 || delta.from_step != before.step) {
    return absl::DataLossError(absl::StrCat(delta.folder, ": was made behind another ",
                                            before.seq == 0 ? "full export" : "delta", " than ", before.folder,
                                            " (previous_sha256 is ", delta.previous_sha256, ", its manifest has ",
                                            before.sha256, "); start from a newer full export"));
  }
  return absl::OkStatus();
}

std::string DeltasFolder(const std::string& out, uint64_t base) { return JoinPath(out, absl::StrCat("delta/", base)); }

absl::StatusOr<std::vector<uint64_t>> ListDeltas(const std::string& out, uint64_t base) {
  return NumbersIn(DeltasFolder(out, base));
}

absl::StatusOr<std::vector<BundleLink>> ReadChain(const std::string& out, uint64_t base) {
  std::vector<BundleLink> chain;
  const auto append = [&](const std::string& folder, uint64_t seq) -> absl::Status {
    HEARTH_ASSIGN_OR_RETURN(BundleLink link, ReadBundleLink(folder));
    if (seq > 0) {
      HEARTH_RETURN_IF_ERROR(CheckFollows(chain.back(), link));
    } else if (link.is_delta || link.seq != 0 || link.base != base) {
      return absl::FailedPreconditionError(
          absl::StrCat(folder, ": is not the full export of step ", base,
                       "; deltas stand on a full export in a folder named by its step"));
    }
    chain.push_back(std::move(link));
    return absl::OkStatus();
  };
  HEARTH_RETURN_IF_ERROR(append(JoinPath(out, absl::StrCat(base)), 0));
  const std::string deltas = DeltasFolder(out, base);
  HEARTH_ASSIGN_OR_RETURN(const std::vector<uint64_t> seqs, ListDeltas(out, base));
  for (const uint64_t seq : seqs) {
    if (seq != chain.size()) {
      return absl::DataLossError(absl::StrCat(JoinPath(deltas, absl::StrCat(chain.size())), ": is missing, and delta ",
                                              seq, " is there; put it back, or start from a new full export"));
    }
    HEARTH_RETURN_IF_ERROR(append(JoinPath(deltas, absl::StrCat(seq)), seq));
  }
  return chain;
}

absl::StatusOr<std::vector<BundleLink>> ReadNewestChain(const std::string& out) {
  HEARTH_ASSIGN_OR_RETURN(const std::vector<uint64_t> steps, NumbersIn(out));
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    if (IsBundle(JoinPath(out, absl::StrCat(*step)))) return ReadChain(out, *step);
  }
  return std::vector<BundleLink>();
}

absl::StatusOr<std::vector<std::string>> SetAsideLine(const std::string& out, uint64_t step,
                                                      const std::string& suffix) {
  std::vector<std::string> names;
  const auto rename = [&](const std::string& folder) -> absl::Status {
    if (!PathExists(folder)) return absl::OkStatus();
    names.push_back(folder + suffix);
    return RenamePath(folder, folder + suffix);
  };
  // A kill between two leaves deltas without their full export on no account, at most a full export without deltas.
  HEARTH_ASSIGN_OR_RETURN(std::vector<uint64_t> bases, NumbersIn(out));
  for (; !bases.empty() && bases.back() > step; bases.pop_back()) {
    HEARTH_RETURN_IF_ERROR(rename(DeltasFolder(out, bases.back())));
    HEARTH_RETURN_IF_ERROR(rename(JoinPath(out, absl::StrCat(bases.back()))));
  }
  if (bases.empty() || !IsBundle(JoinPath(out, absl::StrCat(bases.back())))) return names;
  HEARTH_ASSIGN_OR_RETURN(std::vector<BundleLink> chain, ReadChain(out, bases.back()));
  for (; !chain.empty() && chain.back().step > step; chain.pop_back())
    HEARTH_RETURN_IF_ERROR(rename(chain.back().folder));
  return names;
}

absl::StatusOr<std::vector<std::string>> SetAsideBeyond(const std::string& out, uint64_t step) {
  std::vector<std::string> names;
  while (true) {
    HEARTH_ASSIGN_OR_RETURN(const std::vector<BundleLink> chain, ReadNewestChain(out));
    if (chain.empty() || chain.back().step <= step) return names;
    const std::string aside = chain.back().folder + ".ahead";
    HEARTH_RETURN_IF_ERROR(RemoveTree(aside));
    HEARTH_RETURN_IF_ERROR(RenamePath(chain.back().folder, aside));
    names.push_back(aside);
  }
}

}  // namespace hearth
