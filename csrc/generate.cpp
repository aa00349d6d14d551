// Mirrors rnnkern/_generate_python.py.
#include "generate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <vector>

namespace rnnkern {
namespace {

constexpr auto kTurn = std::chrono::milliseconds(30);  // between two looks at whether the caller was interrupted

struct Candidate {
  double value;
  int64_t index;
  // The better one first.
  bool operator<(const Candidate& other) const {
    return value > other.value || (value == other.value && index < other.index);
  }
};

// Of candidates by ascending index the best `wanted`, as a heap whose top is the worst: one that comes later and is no
// better than that is not needed.
void add_to_best(std::vector<Candidate>& best, size_t wanted, Candidate one) {
  if (best.size() < wanted) {
    best.push_back(one);
  } else if (one.value > best.front().value) {
    std::pop_heap(best.begin(), best.end());
    best.back() = one;
  } else {
    return;
  }
  std::push_heap(best.begin(), best.end());
}

// A decoder's attention from step to step: the h and the readout of every row of the stepper, in the dtype.
class Attended {
 public:
  Attended(const StreamShape& s, const Stepper& stepper, const GenerateCall& call)
      : attention_(call.attention),
        rows_(s.B),
        h_bytes_(s.P * size_of(s.dtype)),
        states_(attention_ ? s.layers * rows_ * h_bytes_ : 0),
        readout_(attention_ ? rows_ * h_bytes_ : 0) {
    if (!attention_) return;
    stepper.read(0, states_.data());
    if (fed() == Fed::readout) std::memcpy(readout_.data(), call.readout, readout_.size());
  }

  explicit operator bool() const { return attention_; }

  // What a step reads beside the token, into rows of x of which it is the end.
  void feed(const uint8_t* active, char* x, int64_t x_bytes, int64_t element) {
    if (!attention_) return;
    const int64_t width = attention_->shape.width() * element;
    char* to = x + x_bytes - width;
    if (fed() == Fed::context) attention_->attend(h(), active, to, x_bytes / element);
    for (int64_t b = 0; fed() == Fed::readout && b < rows_; b++)
      if (active[b]) std::memcpy(to + b * x_bytes, readout_.data() + b * h_bytes_, width);
  }

  char* h() { return states_.data() + states_.size() - rows_ * h_bytes_; }  // the last layer's, where a step leaves it

  // After a step: what the head reads, where it is wanted or fed.
  const void* read(const uint8_t* active, bool wanted) {
    if (!wanted && fed() != Fed::readout) return nullptr;
    if (fed() != Fed::context) attention_->attend(h(), active, nullptr, 0);
    attention_->read(h(), active, readout_.data());
    return readout_.data();
  }

  void select(const int64_t* from) {
    if (!attention_) return;
    for (char* rows : {h(), readout_.data()}) {
      spare_.assign(rows, rows + rows_ * h_bytes_);
      for (int64_t b = 0; b < rows_; b++)
        if (from[b] != b) std::memcpy(rows + b * h_bytes_, spare_.data() + from[b] * h_bytes_, h_bytes_);
    }
  }

 private:
  Fed fed() const { return attention_->shape.fed; }

  Attention* attention_;
  const int64_t rows_, h_bytes_;
  std::vector<char> states_, readout_, spare_;  // states_: [layers, B, P], of which only the last layer is kept up
};

// What both ways of choosing have in common; T is the accumulation dtype.
template <class T>
class Loop : public Generation {
 public:
  Loop(const StreamShape& shape, Stepper& stepper, const GenerateCall& call)
      : call_(call),
        shape_(shape),
        stepper_(stepper),
        prompt_(call.prompt, call.prompt + call.N * call.L),
        lengths_(call.lengths, call.lengths + call.N),
        stops_(call.stops, call.stops + call.stop_count),
        token_(shape.B),
        active_(shape.B),
        logits_(shape.B * shape.V),
        attended_(shape, stepper, call),
        embedded_(call.embedded(shape)) {
    for (int64_t token : prompt_)
      if (token < 0 || token >= call.reads) throw std::invalid_argument("a token of the prompt is out of range");
    for (int64_t length : lengths_)
      if (length < 1 || length > call.L) throw std::invalid_argument("a length of the prompt is out of range");
    row_bytes_ = embedded_ ? embedded_ * size_of(shape.dtype) : gates(shape) * sizeof(T);
    x_bytes_ = shape.I * size_of(shape.dtype);
    x_.resize(shape.B * x_bytes_);
    gates_.resize(shape.B);
  }

  bool advance() final {
    auto begin = std::chrono::steady_clock::now();
    do
      if (!one()) return false;
    while (std::chrono::steady_clock::now() - begin < kTurn);
    return true;
  }

 protected:
  virtual bool one() = 0;  // step; whether there are more

  // The active rows read their tokens.
  void run(bool wanted) {
    StreamCall call;
    for (int64_t b = 0; b < shape_.B; b++) {
      if (!active_[b]) continue;
      const char* from = static_cast<const char*>(call_.table) + token_[b] * row_bytes_;
      if (embedded_)
        std::memcpy(x_.data() + b * x_bytes_, from, row_bytes_);
      else
        gates_[b] = from;
    }
    attended_.feed(active_.data(), x_.data(), x_bytes_, size_of(shape_.dtype));
    call.x = x_.data(), call.x_b = shape_.I, call.active = active_.data();
    if (!embedded_) call.gates = gates_.data();
    if (attended_) {
      call.y = attended_.h(), call.y_b = shape_.P;
      stepper_.run(call);
      call.T = 0, call.read = attended_.read(active_.data(), wanted);
    }
    if (wanted) call.logits = logits_.data();
    if (wanted || !attended_) stepper_.run(call);
  }

  void select(const int64_t* from) {
    stepper_.select(from);
    attended_.select(from);
  }

  const T* logits(int64_t b) const { return logits_.data() + b * shape_.V; }

  // The largest logit of a row of the stepper, which is `n` of the caller's; false where nothing can be chosen.
  bool check(int64_t b, int64_t n, int64_t step, double* highest) {
    *highest = stepper_.highest(logits(b));
    if (std::isfinite(*highest)) return true;
    this->row = n, this->step = step, this->peak = *highest;
    return false;
  }

  bool is_stop(int64_t token) const { return std::find(stops_.begin(), stops_.end(), token) != stops_.end(); }

  const GenerateCall call_;
  const StreamShape shape_;
  Stepper& stepper_;
  const std::vector<int64_t> prompt_, lengths_, stops_;
  std::vector<int64_t> token_;   // [B]: what is read next
  std::vector<uint8_t> active_;  // [B]
  std::vector<T> logits_;        // [B, V]
  int64_t t_ = 0;

 private:
  Attended attended_;
  const int64_t embedded_;  // features of a token; 0: gates
  int64_t row_bytes_ = 0, x_bytes_ = 0;
  std::vector<char> x_;
  std::vector<const void*> gates_;
};

// Greedy, or drawn.
template <class T>
class Rows final : public Loop<T> {
 public:
  Rows(const StreamShape& shape, Stepper& stepper, const GenerateCall& call)
      : Loop<T>(shape, stepper, call), odds_(shape.V) {
    for (int64_t n = 0; n < call.N; n++) {
      this->token_[n] = this->prompt_[n * call.L];
      this->active_[n] = 1;
      call.counts[n] = 0;
    }
    alive_ = call.N;
  }

 private:
  bool one() override {
    if (!alive_) return false;
    const GenerateCall& c = this->call_;
    bool wanted = false;
    for (int64_t n = 0; n < c.N; n++) wanted |= this->active_[n] && this->t_ + 1 >= this->lengths_[n];
    this->run(wanted);
    for (int64_t n = 0; n < c.N; n++) {
      if (!this->active_[n]) continue;
      if (this->t_ + 1 < this->lengths_[n]) {
        this->token_[n] = this->prompt_[n * c.L + this->t_ + 1];
        continue;
      }
      int64_t at = n * c.most + c.counts[n];
      double peak;
      if (!this->check(n, n, c.counts[n], &peak)) return false;
      int64_t chosen = c.uniform ? draw(this->logits(n), peak, c.uniform[at]) : first(this->logits(n), T(peak));
      this->token_[n] = c.tokens[at] = chosen;
      if (++c.counts[n] == c.most || this->is_stop(chosen)) this->active_[n] = 0, alive_--;
    }
    this->t_++;
    return alive_ > 0;
  }

  int64_t first(const T* logits, T peak) const {
    return std::min<int64_t>(std::find(logits, logits + this->shape_.V, peak) - logits, this->shape_.V - 1);
  }

  // By inversion of the distribution function, over the tokens in the order of their numbers.
  int64_t draw(const T* logits, double peak, double uniform) {
    this->stepper_.odds(logits, peak, this->call_.temperature, odds_.data());
    if (this->call_.top_k || this->call_.top_p < 1) restrict(logits, peak);
    // By blocks, whose sums are made first, and in few enough steps that depend on each other.
    constexpr int64_t kBlock = 64, kSums = 4;
    const int64_t V = this->shape_.V;
    double total = 0;
    sums_.clear();
    for (int64_t j = 0; j < V; j += kBlock) {
      double sum[kSums] = {};
      int64_t end = std::min(j + kBlock, V), i = j;
      for (; i + kSums <= end; i += kSums)
        for (int64_t s = 0; s < kSums; s++) sum[s] += odds_[i + s];
      for (; i < end; i++) sum[0] += odds_[i];
      sums_.push_back(total += (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    const int64_t block = std::upper_bound(sums_.begin(), sums_.end() - 1, uniform * total) - sums_.begin();
    const int64_t end = std::min((block + 1) * kBlock, V);
    double below = block ? sums_[block - 1] : 0;
    for (int64_t j = block * kBlock; j < end; j++)
      if ((below += odds_[j]) > uniform * total) return j;
    int64_t last = end - 1;  // a sum or a product was rounded
    while (!(odds_[last] > 0)) last--;
    return last;
  }

  // Leaves the odds of those that top_k and top_p name.
  void restrict(const T* logits, double peak) {
    kept_.assign(this->shape_.V, 0);
    if (this->call_.top_k)
      restrict_k(logits);
    else
      restrict_p(logits, peak);
    odds_.swap(kept_);
  }

  void restrict_k(const T* logits) {
    constexpr int64_t kGroup = 8;
    const int64_t V = this->shape_.V, k = this->call_.top_k;
    // The k-th of the largest of groups is no more than the k-th of all: what is less is not among the best.
    T least = -std::numeric_limits<T>::infinity();
    if (k <= V / kGroup) {
      largest_.clear();
      for (int64_t j = 0; j + kGroup <= V; j += kGroup) {
        T most = logits[j];
        for (int64_t i = 1; i < kGroup; i++) most = logits[j + i] > most ? logits[j + i] : most;
        largest_.push_back(most);
      }
      std::nth_element(largest_.begin(), largest_.begin() + (k - 1), largest_.end(), std::greater<T>());
      least = largest_[k - 1];
    }
    best_.clear();
    for (int64_t j = 0; j < V; j++)
      if (logits[j] >= least) best_.push_back({logits[j], j});
    std::nth_element(best_.begin(), best_.begin() + (k - 1), best_.end());
    best_.resize(k);
    double all = 0;
    for (const Candidate& one : best_) all += odds_[one.index];
    take(this->call_.top_p < 1 ? this->call_.top_p * all : 2 * all);
  }

  // By the mass in ranges of equal width: only the range in which it reaches p is looked at one by one.
  void restrict_p(const T* logits, double peak) {
    constexpr int64_t kRanges = 256;
    const int64_t V = this->shape_.V;
    const double p = this->call_.top_p;
    double all = 0, mass[kRanges] = {};
    for (int64_t j = 0; j < V; j++) all += odds_[j];
    // All whose odds are less than a V-th of 1 - p are together less than 1 - p: none of them is needed.
    double width = -std::log((1 - p) / V * all) * this->call_.temperature + 1e-9 * (1 + std::fabs(peak));
    width = std::min(width, std::numeric_limits<double>::max());
    auto range = [&](int64_t j) { return int64_t(std::min((peak - logits[j]) / width, 1.0) * (kRanges - 1)); };
    for (int64_t j = 0; j < V; j++) mass[range(j)] += odds_[j];
    double sum = 0;
    int64_t reached = 0;
    while (reached + 1 < kRanges && sum + mass[reached] < p * all) sum += mass[reached++];
    best_.clear();
    for (int64_t j = 0; j < V; j++) {
      int64_t own = range(j);
      if (own < reached) kept_[j] = odds_[j];
      if (own == reached) best_.push_back({logits[j], j});
    }
    take(p * all - sum);
  }

  // Of the best as many as have these odds together, in their order, or all.
  void take(double wanted) {
    double sum = 0;
    if (this->call_.top_p < 1) std::sort(best_.begin(), best_.end());
    for (const Candidate& one : best_) {
      if (sum >= wanted) return;
      sum += kept_[one.index] = odds_[one.index];
    }
  }

  int64_t alive_ = 0;
  std::vector<T> odds_;
  std::vector<T> kept_, largest_;
  std::vector<double> sums_;
  std::vector<Candidate> best_;
};

// One row's beams, best first, and the best sequence that has ended.
struct Search {
  struct Step {
    int64_t parent, token;
  };
  std::vector<double> totals = {0.0};
  std::vector<Step> steps;  // [length, beams]: where each beam came from
  int64_t length = 0;
  bool over = false;
  double score = -std::numeric_limits<double>::infinity();
  int64_t best_length = 0, best_parent = 0, best_token = 0;
};

template <class T>
class Beams final : public Loop<T> {
 public:
  Beams(const StreamShape& shape, Stepper& stepper, const GenerateCall& call)
      : Loop<T>(shape, stepper, call), searches_(call.N), from_(shape.B), odds_(shape.V) {
    for (int64_t n = 0; n < call.N; n++) {
      this->token_[n * call.beams] = this->prompt_[n * call.L];
      this->active_[n * call.beams] = 1;
    }
    alive_ = call.N;
  }

 private:
  bool one() override {
    if (!alive_) return false;
    const int64_t K = this->call_.beams;
    bool wanted = false, moved = false;
    for (int64_t n = 0; n < this->call_.N; n++) wanted |= !searches_[n].over && this->t_ + 1 >= this->lengths_[n];
    this->run(wanted);
    for (int64_t b = 0; b < this->shape_.B; b++) from_[b] = b;
    for (int64_t n = 0; n < this->call_.N; n++) {
      Search& search = searches_[n];
      if (search.over) continue;
      if (this->t_ + 1 < this->lengths_[n]) {
        this->token_[n * K] = this->prompt_[n * this->call_.L + this->t_ + 1];
        continue;
      }
      if (!rank(search, n)) return false;
      extend(search);
      const Search::Step* step = search.steps.data() + (search.length - 1) * K;
      int64_t alive = search.over ? 0 : search.totals.size();
      for (int64_t i = 0; i < K; i++) {
        this->active_[n * K + i] = i < alive;
        if (i >= alive) continue;
        this->token_[n * K + i] = step[i].token;
        from_[n * K + i] = n * K + step[i].parent;
        moved |= step[i].parent != i;
      }
      if (search.over) finish(search, n), alive_--;
    }
    if (moved) this->select(from_.data());
    this->t_++;
    return alive_ > 0;
  }

  // The best continuations of a row, as many as are needed to have K that do not end.
  bool rank(const Search& search, int64_t n) {
    const int64_t K = this->call_.beams, V = this->shape_.V, alive = search.totals.size();
    const size_t wanted = std::min<int64_t>(K * (1 + int64_t(this->stops_.size())), alive * V);
    ranked_.clear();
    for (int64_t i = 0; i < alive; i++) {
      const T* logits = this->logits(n * K + i);
      double peak;
      if (!this->check(n * K + i, n, search.length, &peak)) return false;
      double sum = this->stepper_.odds(logits, peak, 1, odds_.data());
      double base = search.totals[i] - peak - std::log(sum);
      for (int64_t j = 0; j < V; j++) add_to_best(ranked_, wanted, {base + logits[j], i * V + j});
    }
    std::sort_heap(ranked_.begin(), ranked_.end());
    return true;
  }

  void extend(Search& search) {
    const int64_t K = this->call_.beams, V = this->shape_.V;
    std::vector<double> totals;
    search.length++;
    search.steps.resize(search.length * K);
    Search::Step* steps = search.steps.data() + (search.length - 1) * K;
    for (size_t rank = 0; rank < ranked_.size() && int64_t(totals.size()) < K; rank++) {
      const Candidate& one = ranked_[rank];
      if (std::isinf(one.value)) break;
      int64_t parent = one.index / V, token = one.index % V;
      if (!this->is_stop(token)) {
        steps[totals.size()] = {parent, token};
        totals.push_back(one.value);
      } else if (int64_t(rank) < K) {
        offer(search, one.value, parent, token);
      }
    }
    search.totals = totals;
    if (search.length == this->call_.most)
      for (size_t i = 0; i < totals.size(); i++) offer(search, totals[i], steps[i].parent, steps[i].token);
    search.over =
        search.length == this->call_.most || totals.empty() || search.score >= within_reach(search, totals[0]);
  }

  double normalised(double total, int64_t length) const {
    return total / std::pow(double(length), this->call_.penalty);
  }

  // The highest score that a beam can still get: by ending next, or by adding certain tokens to the end.
  double within_reach(const Search& search, double total) const {
    return std::max(normalised(total, search.length + 1), normalised(total, this->call_.most));
  }

  void offer(Search& search, double total, int64_t parent, int64_t token) {
    double score = normalised(total, search.length);
    if (!(score > search.score)) return;
    search.score = score;
    search.best_length = search.length, search.best_parent = parent, search.best_token = token;
  }

  void finish(const Search& search, int64_t n) {
    const GenerateCall& c = this->call_;
    int64_t token = search.best_token, parent = search.best_parent;
    for (int64_t k = search.best_length - 1; k >= 0; k--) {
      c.tokens[n * c.most + k] = token;
      if (!k) break;
      const Search::Step& step = search.steps[(k - 1) * c.beams + parent];
      token = step.token, parent = step.parent;
    }
    c.counts[n] = search.best_length;
    c.scores[n] = search.score;
  }

  std::vector<Search> searches_;
  std::vector<int64_t> from_;
  std::vector<T> odds_;
  std::vector<Candidate> ranked_;  // by index beam * V + token
  int64_t alive_ = 0;
};

template <class T>
std::unique_ptr<Generation> make(const StreamShape& shape, Stepper& stepper, const GenerateCall& call) {
  if (call.beams > 1) return std::make_unique<Beams<T>>(shape, stepper, call);
  return std::make_unique<Rows<T>>(shape, stepper, call);
}

}  // namespace

std::unique_ptr<Generation> make_generation(const StreamShape& shape, Stepper& stepper, const GenerateCall& call) {
  return shape.dtype == DType::f64 ? make<double>(shape, stepper, call) : make<float>(shape, stepper, call);
}

}  // namespace rnnkern
