#include "common/net/mpi_runtime.h"

#include <mpi.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <deque>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "common/base/logging.h"
#include "common/base/status.h"

namespace hearth {
namespace {

// After the last thing that happened the loop polls for a while, giving its core away between polls; then it sleeps
// between polls, each time for a fraction of the time since, so that what comes next is late by that fraction at most.
// With something under way, which progresses only while it is polled, it polls much longer (a time at which even a slow
// link has moved the bytes) and sleeps less: an exchange may wait for a peer that computes, perhaps on this very core.
constexpr int64_t kIdlePollUs = 50;
constexpr int64_t kIdleSleepUsMax = 500;
constexpr int64_t kBusyPollUs = 2000;
constexpr int64_t kBusyBytesPerUs = 1000;
constexpr int64_t kBusySleepUsMax = 100;
constexpr int64_t kSleepUsMin = 20;
constexpr int64_t kSleepFraction = 32;
constexpr int64_t kAbortGraceUs = 2'000'000;
constexpr int kArrivalsPerTurnMax = 64;
constexpr int kExchangeTag = 0;
constexpr int kProofTag = 1;                           // beside each buffer of an exchange
constexpr size_t kExchangeBytesMax = size_t{1} << 30;  // of one buffer: MPI counts in int

// Port to port on one tag, so that MPI keeps the order of each pair. The standard promises tags up to 32767.
static_assert(kPortsMax * kPortsMax <= 32768);
int TagOf(int from_port, int to_port) { return from_port * kPortsMax + to_port; }

absl::Span<const char> AsBytes(const SealTag& tag) { return {reinterpret_cast<const char*>(tag.data()), sizeof(tag)}; }

std::string ErrorText(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  return std::string(text, static_cast<size_t>(length));
}

}  // namespace

// What other threads share with the communication thread. Only Loop touches MPI.
struct MpiRuntime::State : public Transport {
  State(Env* env, const JobToken& token)
      : env(env),
        seal(token),
        mailboxes(env),
        wake(env->NewEvent()),
        started(env->NewEvent()),
        exchanged(env->NewEvent()) {}

  // Transport
  int rank() const override { return own_rank; }
  int size() const override { return world_size; }
  Mailbox* Open(int port) override { return mailboxes.Get(port); }
  absl::Status Send(int from_port, Address to, Bytes payload) override;
  uint64_t refused() const override { return refused_messages; }

  // Counts, and tells of each rank once. On the communication thread.
  void Refuse(int source, int tag, absl::string_view cause);

  // On the exchanging thread. Tags beside the buffers.
  void ProveSends(absl::Span<const SendBuffer> sends, std::vector<SealTag>* tags);
  absl::Status CheckProofs(absl::Span<const ReceiveBuffer> receives, const std::vector<SealTag>& tags);

  struct Outgoing {
    int from_port;
    Address to;
    Bytes payload;
  };
  // First all buffers, then the proof of each.
  struct ExchangeCall {
    absl::Span<const SendBuffer> sends;
    absl::Span<const ReceiveBuffer> receives;
    absl::Status result;
  };

  Env* const env;
  const Seal seal;
  MailboxSet mailboxes;
  const std::unique_ptr<Event> wake;       // for the loop
  const std::unique_ptr<Event> started;    // for Start
  const std::unique_ptr<Event> exchanged;  // for the thread in Exchange

  // Written by the loop before `started`, constant afterwards.
  int own_rank = 0;
  int world_size = 1;
  absl::Status start_status;

  std::mutex mutex;
  std::deque<Outgoing> outgoing;     // guarded by mutex
  ExchangeCall* exchange = nullptr;  // guarded by mutex; what it points at is the loop's until `exchanged`
  bool stopping = false;             // guarded by mutex
  int abort_code = -1;               // guarded by mutex; >= 0: end the job

  // Counted by whoever sends or exchanges, and by the loop.
  struct Flow {
    std::atomic<uint64_t> messages{0};
    std::atomic<uint64_t> bytes{0};
    void Count(size_t more) {
      if (more == 0) return;  // an empty buffer is not sent
      ++messages;
      bytes += more;
    }
  };
  Flow sent, received;

  std::atomic<uint64_t> refused_messages{0};
  std::set<int> refused_ranks;  // the loop's; which have been told

  // The exchanging thread's; by rank: how many buffers went there and came from there.
  std::vector<uint64_t> exchanged_to, exchanged_from;

  std::unique_ptr<Thread> thread;
};

// The communication thread: everything here runs on it alone.
class MpiRuntime::Loop {
 public:
  explicit Loop(State* state) : state_(state) {}

  absl::Status Init() {
    int initialized = 0;
    MPI_Initialized(&initialized);
    if (initialized) return absl::FailedPreconditionError("MPI was started already; it starts once a process");
    int provided = 0;
    const int code = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
    if (code != MPI_SUCCESS) return absl::UnavailableError(absl::StrCat("MPI_Init_thread: ", ErrorText(code)));
    if (provided < MPI_THREAD_FUNNELED) {
      return absl::FailedPreconditionError("MPI has no support for threads; use an MPI built with MPI_THREAD_FUNNELED");
    }
    MPI_Comm_rank(MPI_COMM_WORLD, &state_->own_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &state_->world_size);
    state_->exchanged_to.resize(static_cast<size_t>(state_->world_size));
    state_->exchanged_from.resize(static_cast<size_t>(state_->world_size));
    MPI_Comm_dup(MPI_COMM_WORLD, &messages_);
    MPI_Comm_dup(MPI_COMM_WORLD, &exchanges_);
    // A length that does not fit is reported, not fatal; errors of messages end the job (MPI's default).
    MPI_Comm_set_errhandler(exchanges_, MPI_ERRORS_RETURN);
    return absl::OkStatus();
  }

  // Until all ranks have stopped.
  void Run() {
    int64_t active_us = state_->env->NowUs();
    while (!finished_) {
      if (Turn()) {
        active_us = state_->env->NowUs();
        continue;
      }
      const bool busy = !sends_.empty() || !receives_.empty() || exchange_ != nullptr;
      const int64_t now_us = state_->env->NowUs();
      const int64_t idle_us = now_us - active_us;
      if (idle_us < (busy ? kBusyPollUs + BytesUnderWay() / kBusyBytesPerUs : kIdlePollUs)) {
        sched_yield();
      } else {
        const int64_t sleep_us_max = busy ? kBusySleepUsMax : kIdleSleepUsMax;
        state_->wake->WaitUntil(now_us + std::clamp(idle_us / kSleepFraction, kSleepUsMin, sleep_us_max));
      }
    }
  }

  void Finalize() {
    MPI_Comm_free(&messages_);
    MPI_Comm_free(&exchanges_);
    MPI_Finalize();
  }

 private:
  struct Receive {
    int source;
    int tag;
    Bytes payload;
    bool done;
  };

  // One look at everything; true if anything happened.
  bool Turn() {
    bool active = TakeOrders();
    active |= CompleteSends();
    active |= AcceptArrivals();
    active |= CompleteReceives();
    active |= ProgressExchange();
    active |= ProgressStop();
    return active;
  }

  bool TakeOrders() {
    std::deque<State::Outgoing> outgoing;
    State::ExchangeCall* exchange = nullptr;
    {
      std::lock_guard<std::mutex> lock(state_->mutex);
      if (state_->abort_code >= 0) MPI_Abort(MPI_COMM_WORLD, state_->abort_code);
      outgoing.swap(state_->outgoing);
      std::swap(exchange, state_->exchange);
      stopping_ = state_->stopping;
    }
    for (State::Outgoing& message : outgoing) {
      MPI_Request request;
      MPI_Isend(message.payload.data(), static_cast<int>(message.payload.size()), MPI_BYTE, message.to.rank,
                TagOf(message.from_port, message.to.port), messages_, &request);
      sends_.push_back(request);
      sent_.push_back(std::move(message.payload));
    }
    if (exchange != nullptr) StartExchange(exchange);
    return !outgoing.empty() || exchange != nullptr;
  }

  bool CompleteSends() {
    if (sends_.empty()) return false;
    const int done = TestSome(&sends_);
    for (int i = 0; i < done; ++i) sent_[indices_[i]] = Bytes();
    Compact(&sends_, &sent_);
    return done > 0;
  }

  bool AcceptArrivals() {
    for (int arrivals = 0; arrivals < kArrivalsPerTurnMax; ++arrivals) {
      int found = 0;
      MPI_Message message;
      MPI_Status status;
      MPI_Improbe(MPI_ANY_SOURCE, MPI_ANY_TAG, messages_, &found, &message, &status);
      if (!found) return arrivals > 0;
      int bytes = 0;
      MPI_Get_count(&status, MPI_BYTE, &bytes);
      // No rank of ours sends so much. It stays with MPI: to take it in is to make room for it.
      if (bytes < 0 || static_cast<size_t>(bytes) > kPayloadBytesMax) {
        state_->Refuse(status.MPI_SOURCE, status.MPI_TAG, "it is longer than any message");
        continue;
      }
      receives_.push_back({status.MPI_SOURCE, status.MPI_TAG, Bytes(static_cast<size_t>(bytes)), false});
      MPI_Request request;
      MPI_Imrecv(receives_.back().payload.data(), bytes, MPI_BYTE, &message, &request);
      receive_requests_.push_back(request);
    }
    return true;
  }

  // A short message may be complete before a long one that came first: what is delivered of a pair of ports keeps the
  // order of arrival.
  bool CompleteReceives() {
    if (receives_.empty()) return false;
    const int done = TestSome(&receive_requests_);
    if (done == 0) return false;
    for (int i = 0; i < done; ++i) receives_[indices_[i]].done = true;
    std::set<std::pair<int, int>> blocked;  // (source, tag) with an earlier message still under way
    size_t kept = 0;
    for (size_t i = 0; i < receives_.size(); ++i) {
      Receive& receive = receives_[i];
      if (receive.done && blocked.count({receive.source, receive.tag}) == 0) {
        Deliver(&receive);
        continue;
      }
      blocked.insert({receive.source, receive.tag});
      if (kept != i) {
        receives_[kept] = std::move(receive);
        receive_requests_[kept] = receive_requests_[i];
      }
      ++kept;
    }
    receives_.erase(receives_.begin() + static_cast<ptrdiff_t>(kept), receives_.end());
    receive_requests_.resize(kept);
    return true;
  }

  void Deliver(Receive* receive) {
    const Address from = {receive->source, receive->tag / kPortsMax};
    const Address to = {state_->own_rank, receive->tag % kPortsMax};
    const absl::Status proof = state_->seal.Check(from, to, receive->payload.span());
    if (!proof.ok()) return state_->Refuse(receive->source, receive->tag, proof.message());
    state_->received.Count(receive->payload.size());
    state_->mailboxes.Get(to.port)->Deliver({from, std::move(receive->payload)});
  }

  void StartExchange(State::ExchangeCall* call) {
    exchange_ = call;
    exchange_->result = absl::OkStatus();
    exchange_requests_.clear();
    for (size_t i = 0; i < call->receives.size(); ++i) {
      const ReceiveBuffer& receive = call->receives[i];
      MPI_Request request = MPI_REQUEST_NULL;
      if (!receive.bytes.empty()) {
        MPI_Irecv(receive.bytes.data(), static_cast<int>(receive.bytes.size()), MPI_BYTE, receive.rank,
                  2 * i < call->receives.size() ? kExchangeTag : kProofTag, exchanges_, &request);
      }
      exchange_requests_.push_back(request);
    }
    for (size_t i = 0; i < call->sends.size(); ++i) {
      const SendBuffer& send = call->sends[i];
      MPI_Request request = MPI_REQUEST_NULL;
      if (!send.bytes.empty()) {
        MPI_Isend(send.bytes.data(), static_cast<int>(send.bytes.size()), MPI_BYTE, send.rank,
                  2 * i < call->sends.size() ? kExchangeTag : kProofTag, exchanges_, &request);
      }
      exchange_requests_.push_back(request);
    }
  }

  // Each request is tested by itself: after an error the state of its neighbours in a common test is not certain.
  bool ProgressExchange() {
    if (exchange_ == nullptr) return false;
    bool active = false;
    bool open = false;
    for (size_t i = 0; i < exchange_requests_.size(); ++i) {
      if (exchange_requests_[i] == MPI_REQUEST_NULL) continue;
      int done = 0;
      MPI_Status status;
      const int code = MPI_Test(&exchange_requests_[i], &done, &status);
      if (code != MPI_SUCCESS) exchange_requests_[i] = MPI_REQUEST_NULL;
      if (code == MPI_SUCCESS && !done) {
        open = true;
        continue;
      }
      active = true;
      const bool is_receive = i < exchange_->receives.size();
      CheckExchanged(is_receive ? &exchange_->receives[i] : nullptr, code, status);
    }
    if (open) return active;
    exchange_ = nullptr;
    state_->exchanged->Notify();
    return true;
  }

  void CheckExchanged(const ReceiveBuffer* receive, int code, const MPI_Status& status) {
    if (code != MPI_SUCCESS) {
      const std::string what =
          receive == nullptr ? "send"
                             : absl::StrCat("receive of ", receive->bytes.size(), " bytes from rank ", receive->rank);
      exchange_->result.Update(absl::InternalError(absl::StrCat("exchange: ", what, ": ", ErrorText(code))));
      return;
    }
    if (receive == nullptr) return;
    int bytes = 0;
    MPI_Get_count(&status, MPI_BYTE, &bytes);
    if (static_cast<size_t>(bytes) == receive->bytes.size()) return;
    exchange_->result.Update(absl::InternalError(
        absl::StrCat("exchange: rank ", receive->rank, " sent ", bytes, " bytes, expected ", receive->bytes.size())));
  }

  // When all of ours is sent, says so; goes on receiving until all ranks have said so, and then what is still there.
  bool ProgressStop() {
    if (!stopping_ || finished_) return false;
    if (barrier_ == MPI_REQUEST_NULL) {
      if (!sends_.empty() || exchange_ != nullptr) return false;
      MPI_Ibarrier(messages_, &barrier_);
      return true;
    }
    int done = 0;
    MPI_Test(&barrier_, &done, MPI_STATUS_IGNORE);
    if (!done) return false;
    while (AcceptArrivals() || !receives_.empty()) CompleteReceives();
    finished_ = true;
    return true;
  }

  int64_t BytesUnderWay() const {
    size_t bytes = 0;
    for (const Bytes& payload : sent_) bytes += payload.size();
    for (const Receive& receive : receives_) bytes += receive.payload.size();
    if (exchange_ != nullptr) {
      for (const SendBuffer& send : exchange_->sends) bytes += send.bytes.size();
      for (const ReceiveBuffer& receive : exchange_->receives) bytes += receive.bytes.size();
    }
    return static_cast<int64_t>(bytes);
  }

  // Returns how many completed; indices_ says which.
  int TestSome(std::vector<MPI_Request>* requests) {
    indices_.resize(requests->size());
    int done = 0;
    MPI_Testsome(static_cast<int>(requests->size()), requests->data(), &done, indices_.data(), MPI_STATUSES_IGNORE);
    return done == MPI_UNDEFINED ? 0 : done;  // undefined: none is active
  }

  // Drops what completed.
  static void Compact(std::vector<MPI_Request>* requests, std::vector<Bytes>* payloads) {
    size_t kept = 0;
    for (size_t i = 0; i < requests->size(); ++i) {
      if ((*requests)[i] == MPI_REQUEST_NULL) continue;
      if (kept != i) {
        (*requests)[kept] = (*requests)[i];
        (*payloads)[kept] = std::move((*payloads)[i]);
      }
      ++kept;
    }
    requests->resize(kept);
    payloads->erase(payloads->begin() + static_cast<ptrdiff_t>(kept), payloads->end());
  }

  State* const state_;
  MPI_Comm messages_ = MPI_COMM_NULL;
  MPI_Comm exchanges_ = MPI_COMM_NULL;

  std::vector<MPI_Request> sends_;  // and, beside each, the bytes that it reads
  std::vector<Bytes> sent_;
  std::vector<MPI_Request> receive_requests_;  // beside receives_; null once done
  std::vector<Receive> receives_;              // in the order of arrival
  std::vector<int> indices_;

  State::ExchangeCall* exchange_ = nullptr;
  std::vector<MPI_Request> exchange_requests_;  // receives, then sends

  bool stopping_ = false;
  MPI_Request barrier_ = MPI_REQUEST_NULL;
  bool finished_ = false;
};

namespace {

absl::Status CheckBuffer(int own_rank, int size, int rank, size_t bytes, std::set<int>* seen) {
  if (rank < 0 || rank >= size || rank == own_rank) {
    return absl::InvalidArgumentError(absl::StrCat("exchange: rank ", rank, " is not another one of ", size));
  }
  if (!seen->insert(rank).second) {
    return absl::InvalidArgumentError(absl::StrCat("exchange: two buffers for rank ", rank));
  }
  if (bytes > kExchangeBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("exchange: ", bytes, " bytes for rank ", rank, ", at most ", kExchangeBytesMax, " go at once"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status MpiRuntime::State::Send(int from_port, Address to, Bytes payload) {
  HEARTH_RETURN_IF_ERROR(CheckSend(world_size, from_port, to, payload.size()));
  if (to.rank == own_rank) {
    mailboxes.Get(to.port)->Deliver({{own_rank, from_port}, std::move(payload)});
    return absl::OkStatus();
  }
  seal.Put({own_rank, from_port}, to, &payload);
  sent.Count(payload.size());
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (stopping) return absl::UnavailableError("send: this process is leaving");
    outgoing.push_back({from_port, to, std::move(payload)});
  }
  wake->Notify();
  return absl::OkStatus();
}

void MpiRuntime::State::Refuse(int source, int tag, absl::string_view cause) {
  ++refused_messages;
  if (!refused_ranks.insert(source).second) return;
  spdlog::warn("event=refused from_rank={} from_port={} to_port={} cause={}", source, tag / kPortsMax, tag % kPortsMax,
               Quoted(absl::StrCat("a message was dropped, and so will be what else comes like it: ", cause,
                                   "; either somebody else reaches the ranks' ports (docs/SECURITY.md), or the rank "
                                   "has another ",
                                   kJobTokenVariable, " or build")));
}

MpiRuntime::MpiRuntime(std::unique_ptr<State> state) : state_(std::move(state)) {}

absl::StatusOr<std::unique_ptr<MpiRuntime>> MpiRuntime::Start(Env* env) {
  HEARTH_ASSIGN_OR_RETURN(const JobToken token, JobToken::TakeFromEnvironment());
  return Start(env, token);
}

absl::StatusOr<std::unique_ptr<MpiRuntime>> MpiRuntime::Start(Env* env, const JobToken& token) {
  auto owned = std::make_unique<State>(env, token);
  State* const state = owned.get();
  state->thread = env->StartThread("mpi", [state] {
    Loop loop(state);
    state->start_status = loop.Init();
    const bool ok = state->start_status.ok();
    state->started->Notify();
    if (!ok) return;
    loop.Run();
    loop.Finalize();
  });
  state->started->WaitUntil(kNever);
  if (!state->start_status.ok()) return state->start_status;
  return std::unique_ptr<MpiRuntime>(new MpiRuntime(std::move(owned)));
}

MpiRuntime::~MpiRuntime() {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stopping = true;
  }
  state_->wake->Notify();
  state_->thread.reset();  // joins
}

Transport* MpiRuntime::transport() { return state_.get(); }

void MpiRuntime::State::ProveSends(absl::Span<const SendBuffer> sends, std::vector<SealTag>* tags) {
  absl::Span<const char> hashed;  // one buffer may go to all
  uint64_t hash = 0;
  for (const SendBuffer& send : sends) {
    tags->emplace_back();
    if (send.bytes.empty()) continue;
    if (send.bytes.data() != hashed.data() || send.bytes.size() != hashed.size()) hash = seal.HashOf(send.bytes);
    hashed = send.bytes;
    tags->back() =
        seal.TagOfBuffer(own_rank, send.rank, exchanged_to[static_cast<size_t>(send.rank)]++, send.bytes.size(), hash);
  }
}

absl::Status MpiRuntime::State::CheckProofs(absl::Span<const ReceiveBuffer> receives,
                                            const std::vector<SealTag>& tags) {
  absl::Status status;
  for (size_t i = 0; i < receives.size(); ++i) {
    const ReceiveBuffer& receive = receives[i];
    if (receive.bytes.empty()) continue;
    const uint64_t number = exchanged_from[static_cast<size_t>(receive.rank)]++;
    if (tags[i] == seal.TagOfBuffer(receive.rank, own_rank, number, receive.bytes.size(), seal.HashOf(receive.bytes))) {
      continue;
    }
    status.Update(absl::InternalError(absl::StrCat(
        "exchange: what came from rank ", receive.rank, " has no proof that a rank of this job sent it; ",
        "keep others from the ranks' ports (docs/SECURITY.md), and give all ranks one ", kJobTokenVariable)));
  }
  return status;
}

absl::Status MpiRuntime::Exchange(absl::Span<const SendBuffer> sends, absl::Span<const ReceiveBuffer> receives) {
  std::set<int> to, from;
  for (const SendBuffer& send : sends) {
    HEARTH_RETURN_IF_ERROR(CheckBuffer(state_->own_rank, state_->world_size, send.rank, send.bytes.size(), &to));
  }
  for (const ReceiveBuffer& receive : receives) {
    HEARTH_RETURN_IF_ERROR(
        CheckBuffer(state_->own_rank, state_->world_size, receive.rank, receive.bytes.size(), &from));
  }
  // A proof has 16 bytes beside each buffer: hashed here, so that the loop goes on moving messages.
  std::vector<SealTag> sent, received;
  std::vector<SendBuffer> all_sends(sends.begin(), sends.end());
  std::vector<ReceiveBuffer> all_receives(receives.begin(), receives.end());
  sent.reserve(sends.size());
  received.resize(receives.size());
  state_->ProveSends(sends, &sent);
  for (size_t i = 0; i < sends.size(); ++i) {
    all_sends.push_back({sends[i].rank, AsBytes(sent[i]).subspan(0, sends[i].bytes.empty() ? 0 : sizeof(SealTag))});
  }
  for (size_t i = 0; i < receives.size(); ++i) {
    const size_t bytes = receives[i].bytes.empty() ? 0 : sizeof(SealTag);
    all_receives.push_back({receives[i].rank, absl::MakeSpan(reinterpret_cast<char*>(received[i].data()), bytes)});
  }
  for (const SendBuffer& send : all_sends) state_->sent.Count(send.bytes.size());
  for (const ReceiveBuffer& receive : all_receives) state_->received.Count(receive.bytes.size());
  State::ExchangeCall call{all_sends, all_receives, absl::OkStatus()};
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    HEARTH_CHECK(state_->exchange == nullptr, "one thread a process may exchange");
    state_->exchange = &call;
  }
  state_->wake->Notify();
  state_->exchanged->WaitUntil(kNever);
  call.result.Update(state_->CheckProofs(receives, received));
  return call.result;
}

void MpiRuntime::TellTraffic() const {
  spdlog::info("event=traffic messages_sent={} bytes_sent={} messages_received={} bytes_received={}",
               state_->sent.messages.load(), state_->sent.bytes.load(), state_->received.messages.load(),
               state_->received.bytes.load());
}

void MpiRuntime::Abort(int exit_code) {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->abort_code = exit_code;
  }
  state_->wake->Notify();
  // MPI_Abort ends this process, too. If the thread does not come to it, leaving without MPI_Finalize ends the job as
  // well.
  const std::unique_ptr<Event> never = state_->env->NewEvent();
  never->WaitUntil(state_->env->NowUs() + kAbortGraceUs);
  std::fprintf(stderr, "event=abort_slow exit_code=%d\n", exit_code);
  _exit(exit_code);
}

}  // namespace hearth
