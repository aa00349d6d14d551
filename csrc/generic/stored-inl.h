// What streams and attention keep between calls, and numbers between the caller's dtype and what is computed with; no
// include guard: included once per ISA namespace.

template <class T>
class Owned {
 public:
  Owned() = default;
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { release(data_); }
  void allocate(int64_t count) { data_ = (T*)allocate_zeros(size_t(count) * sizeof(T)); }
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
};

// CT is the accumulation dtype.
template <class CT>
class Stored {
 protected:
  typedef vec<CT> V;
  static constexpr int n = Simd<CT>::n;

  explicit Stored(DType dtype) : dtype_(dtype) {}

  static int left(int64_t size, int64_t j) { return int(size - j < n ? size - j : n); }

  template <class From, class To>
  static RK_INLINE void copy_row(const From* from, To* to, int64_t size) {
    for (int64_t j = 0; j < size; j += n) store(to + j, load(from + j, left(size, j)), left(size, j));
  }

  // From null: zero.
  template <class To>
  void enter(const void* from, int64_t at, To* to, int64_t size) const {
    if (!from) return (void)__builtin_memset((void*)to, 0, size * sizeof(To));
    if constexpr (sizeof(CT) == sizeof(double))
      copy_row((const double*)from + at, to, size);
    else if (dtype_ == DType::bf16)
      copy_row((const bf16*)from + at, to, size);
    else if (dtype_ == DType::f16)
      copy_row((const f16*)from + at, to, size);
    else
      copy_row((const float*)from + at, to, size);
  }

  template <class From>
  void leave(const From* from, void* to, int64_t at, int64_t size) const {
    if constexpr (sizeof(CT) == sizeof(double))
      copy_row(from, (double*)to + at, size);
    else if (dtype_ == DType::bf16)
      copy_row(from, (bf16*)to + at, size);
    else if (dtype_ == DType::f16)
      copy_row(from, (f16*)to + at, size);
    else
      copy_row(from, (float*)to + at, size);
  }

  void zero(void* to, int64_t at, int64_t size) const {
    int64_t bytes = dtype_ == DType::f64 ? 8 : dtype_ == DType::f32 ? 4 : 2;
    __builtin_memset((char*)to + at * bytes, 0, size * bytes);
  }

  // x as it would be read back from the caller's dtype.
  RK_INLINE V as_stored(V x) const {
    if constexpr (sizeof(CT) == sizeof(float)) {
      if (dtype_ == DType::bf16) return rounded(x, (bf16*)nullptr);
      if (dtype_ == DType::f16) return rounded(x, (f16*)nullptr);
    }
    return x;
  }

 private:
  DType dtype_;
};
