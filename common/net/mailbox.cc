#include "common/net/mailbox.h"

namespace hearth {

void Mailbox::Deliver(Message message) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    messages_.push_back(std::move(message));
  }
  arrived_->Notify();
}

std::optional<Message> Mailbox::Receive(int64_t deadline_us) {
  while (true) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!messages_.empty()) {
        std::optional<Message> message(std::move(messages_.front()));
        messages_.pop_front();
        return message;
      }
    }
    // A notification may belong to a message taken already: look again until the deadline. A message that came together
    // with the deadline has notified the event, so it is not missed; at worst the next call takes it.
    if (!arrived_->WaitUntil(deadline_us) && env_->NowUs() >= deadline_us) return std::nullopt;
  }
}

Mailbox* MailboxSet::Get(int port) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<Mailbox>& mailbox = mailboxes_[port];
  if (mailbox == nullptr) mailbox = std::make_unique<Mailbox>(env_);
  return mailbox.get();
}

}  // namespace hearth
