// Products of whole matrices, for what a layer's backward does after its scan; no include guard. The right side is
// packed by pieces of its rows, which all threads read; each takes its own rows of the left side.

template <class CT>
class GemmRun {
  typedef Plain<CT, CT> M;
  static constexpr int n = Simd<CT>::n, kWide = 4;
  static constexpr int64_t kDepth = 512, kUnits = 6;  // of n rows: as many as whole tiles hold, and in the second cache

 public:
  GemmRun(const Gemm& call, int threads) : g_(call) {
    threads_ = threads;
    pieces_ = ceil_div(g_.K, kDepth);
    apart_ = threads > 1 && g_.K >= threads * kLeast && g_.M * g_.N * int64_t(sizeof(CT)) <= kNear;
    units_ = ceil_div(g_.M, n);
    if (apart_)
      pieces_ = ceil_div(pieces_, threads_) * threads_;
    else if (threads_ > units_)
      threads_ = int(units_);
    const int sharing = apart_ ? 1 : threads_;
    blocks_ = ceil_div(ceil_div(units_, kUnits), sharing) * sharing;
    if (blocks_ > units_) blocks_ = units_;
    const int64_t depth = ceil_div(g_.K, pieces_);
    stride_ = ceil_div(depth, n) * n + n;  // one vector more: powers of two would share few sets of the cache
    rows_size_ = ceil_div(units_, blocks_) * n;
    right_size_ = depth * ceil_div(g_.N, n) * n;
    mem_.add(&right_, (apart_ ? threads_ : 1) * right_size_);
    mem_.add(&left_, g_.a_k == 1 ? 0 : threads_ * rows_size_ * stride_);
    mem_.add(&sums_, threads_ * rows_size_ * kWide * n);
    mem_.add(&rows_, threads_ * rows_size_);
    mem_.add(&parts_, apart_ ? threads_ * g_.M * g_.N : 0);
    mem_.allocate();
    barrier_.reset(threads_);
  }

  int threads() const { return threads_; }

  void work(int rank) {
    if (apart_) return work_apart(rank);
    for (int64_t piece = 0; piece < pieces_; piece++) {
      const Range sums = share(g_.K, pieces_, piece);
      pack_right(sums, share(sums.size(), threads_, rank), right_);
      barrier_.wait();
      for (int64_t block = rank; block < blocks_; block += threads_)
        multiply(sums, block, rank, right_, (CT*)g_.out, g_.out_m, piece || g_.add);
      barrier_.wait();
    }
  }

 private:
  // A small result: each thread has pieces of the sum of its own, and shares nothing before the end.
  static constexpr int64_t kNear = 256 << 10, kLeast = 128;

  void work_apart(int rank) {
    CT *right = right_ + rank * right_size_, *part = parts_ + rank * g_.M * g_.N;
    for (int64_t piece = rank; piece < pieces_; piece += threads_) {
      const Range sums = share(g_.K, pieces_, piece);
      pack_right(sums, {0, sums.size()}, right);
      for (int64_t block = 0; block < blocks_; block++) multiply(sums, block, rank, right, part, g_.N, piece != rank);
    }
    barrier_.wait();
    const Range rows = share(g_.M, threads_, rank);
    for (int64_t i = rows.begin; i < rows.end; i++)
      for (int64_t j = 0; j < g_.N; j += n) {
        const int valid = left_of(g_.N, j);
        CT* to = (CT*)g_.out + i * g_.out_m + j;
        vec<CT> x = g_.add ? load(to, valid) : vec<CT>{};
        for (int k = 0; k < threads_; k++) x += load(parts_ + (k * g_.M + i) * g_.N + j, valid);
        store(to, x, valid);
      }
  }

  static int left_of(int64_t size, int64_t j) { return int(size - j < n ? size - j : n); }

  Walk panels() const { return {{0, ceil_div(g_.N, n)}, kWide}; }

  // Some of the rows of a piece into its panels.
  void pack_right(Range sums, Range mine, CT* right) {
    const Walk walk = panels();
    const CT* first = (const CT*)g_.b + (sums.begin + mine.begin) * g_.b_k;
    for (int64_t p = 0; p < walk.count(); p++) {
      int64_t column = walk[p] * n;
      int NV = walk.units(p);
      pack_nn<M>(first, g_.b_k, mine.size(), column, g_.N - column, NV,
                 right + column * sums.size() + mine.begin * NV * n);
    }
  }

  // The rows of one block, as the product takes them: where they lie, or turned.
  const CT* const* left(Range sums, Range rows, int rank) {
    const CT** row = rows_ + rank * rows_size_;
    const CT* a = (const CT*)g_.a + rows.begin * g_.a_m + sums.begin * g_.a_k;
    if (g_.a_k == 1) {
      for (int64_t i = 0; i < rows.size(); i++) row[i] = a + i * g_.a_m;
      return row;
    }
    CT* turned = left_ + rank * rows_size_ * stride_;
    for (int64_t k = 0; k < sums.size(); k += n)
      for (int64_t i = 0; i < rows.size(); i += n) {
        int valid = left_of(rows.size(), i);
        vec<CT> square[n];
        for (int s = 0; s < n; s++) square[s] = k + s < sums.size() ? load(a + (k + s) * g_.a_k + i, valid) : vec<CT>{};
        transpose<CT>(square);
        for (int r = 0; r < valid; r++) store(turned + (i + r) * stride_ + k, square[r]);
      }
    for (int64_t i = 0; i < rows.size(); i++) row[i] = turned + i * stride_;
    return row;
  }

  // A block's rows of one piece into `to` [M, N], or added to what is there.
  void multiply(Range sums, int64_t block, int rank, const CT* right, CT* to, int64_t to_m, bool add) {
    const Range rows = share(units_, blocks_, block).columns(n, g_.M);
    const CT* const* row = left(sums, rows, rank);
    const Walk walk = panels();
    CT* out = sums_ + rank * rows_size_ * kWide * n;
    for (int64_t p = 0; p < walk.count(); p++) {
      const int64_t column = walk[p] * n;
      const int NV = walk.units(p);
      packed_rows<M>(rows.size(), NV, row, right + column * sums.size(), right + walk.next(p) * n * sums.size(),
                     sums.size(), nullptr, out);
      for (int64_t i = 0; i < rows.size(); i++)
        for (int v = 0; v < NV; v++) {
          const int64_t j = column + v * n;
          const int valid = left_of(g_.N, j);
          CT* at = to + (rows.begin + i) * to_m + j;
          vec<CT> x = load(out + (i * NV + v) * n);
          store(at, add ? x + load(at, valid) : x, valid);
        }
    }
  }

  const Gemm& g_;
  int threads_;
  bool apart_;
  int64_t units_, blocks_, pieces_, stride_, rows_size_, right_size_;
  CT *right_, *left_, *sums_, *parts_;
  const CT** rows_;
  Scratch mem_;
  Barrier barrier_;
};
