// Ranges and the shares that threads take of them; no include guard.

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  int take(int64_t from, int most) const { return int(end - from < most ? end - from : most); }
  // Blocks of n columns as columns, of `limit` in all.
  Range columns(int n, int64_t limit) const { return {begin * n, end * n < limit ? end * n : limit}; }
};

// From null: zero.
template <class T>
static inline void copy_columns(const T* from, T* to, Range c) {
  if (c.size() <= 0) return;
  if (from)
    __builtin_memcpy(to + c.begin, from + c.begin, c.size() * sizeof(T));
  else
    __builtin_memset(to + c.begin, 0, c.size() * sizeof(T));
}

static inline Range share(int64_t total, int64_t parts, int64_t part) {
  return {total * part / parts, total * (part + 1) / parts};
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The blocks of a range in panels of `width`, forwards or back.
struct Walk {
  Range range;
  int64_t width;
  bool back = false;

  int64_t count() const { return ceil_div(range.size(), width); }
  int64_t operator[](int64_t p) const { return range.begin + (back ? count() - 1 - p : p) * width; }
  // The panel after p; the last one again after the last.
  int64_t next(int64_t p) const { return (*this)[p + 1 < count() ? p + 1 : p]; }
  int units(int64_t p) const { return range.take((*this)[p], int(width)); }
};

// Towards the second cache, while a product runs: what will be read, and what will be written.
template <class T>
static inline void prefetch_columns(const T* row, Range c, bool write) {
  const char* end = (const char*)(row + c.end);
  for (const char* p = (const char*)(row + c.begin); p < end; p += 64)
    if (write)
      __builtin_prefetch(p, 1, 2);
    else
      __builtin_prefetch(p, 0, 2);
}
