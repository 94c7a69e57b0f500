// The control plane's envelope: one protobuf `Control` after a header of kind kControl (docs/FORMATS.md).
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/bytes.h"
#include "common/proto/control.pb.h"

namespace hearth {

// `step`: the header's; where the sender stands, for whoever reads a trace.
Bytes EncodeControl(const Control& control, uint64_t step = 0);
// Nothing where the body does not parse. REQUIRES: DecodeHeader succeeded on `message` and says kControl.
std::optional<Control> ParseControl(absl::Span<const char> message);
// What a process that fails with `status` tells the scheduler; the sender adds who it is.
Control FailedControl(const absl::Status& status);

}  // namespace hearth
