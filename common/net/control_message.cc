#include "common/net/control_message.h"

#include <string>

#include "common/base/status.h"
#include "common/net/wire.h"

namespace hearth {

Bytes EncodeControl(const Control& control, uint64_t step) {
  Header header;
  header.kind = MessageKind::kControl;
  header.step = step;
  const std::string body = control.SerializeAsString();
  return EncodeOpaque(header, {body.data(), body.size()});
}

std::optional<Control> ParseControl(absl::Span<const char> message) {
  const absl::Span<const char> body = OpaqueBody(message);
  std::optional<Control> control(std::in_place);
  if (!control->ParseFromArray(body.data(), static_cast<int>(body.size()))) control.reset();
  return control;
}

Control FailedControl(const absl::Status& status) {
  Control control;
  control.mutable_failed()->set_exit_code(ExitCodeOf(status));
  control.mutable_failed()->set_reason(std::string(status.message()));
  return control;
}

}  // namespace hearth
