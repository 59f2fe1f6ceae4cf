// Memory for scratch matrices.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

// An array to allocate: the pointer that gets its address, and how many elements it has.
template <class X>
struct Array {
  X*& pointer;
  size_t count;
};
template <class X>
Array(X*&, size_t) -> Array<X>;

// Memory that grows and is kept: a call a layer must not ask the system for pages.
class Arena {
  char* memory = nullptr;
  size_t capacity = 0;

 public:
  ~Arena() { std::free(memory); }
  // Place arrays one after another, each at a multiple of 64 bytes; earlier ones are gone.
  template <class... X>
  void allocate(Array<X>... arrays) {
    reserve((bytes<X>(arrays.count) + ...));
    size_t used = 0;
    ((arrays.pointer = (X*)(memory + used), used += bytes<X>(arrays.count)), ...);
  }

 private:
  void reserve(size_t bytes) {
    if (bytes <= capacity) return;
    std::free(memory);
    capacity = (bytes + bytes / 4 + 63) / 64 * 64;
    memory = (char*)std::aligned_alloc(64, capacity);
    if (!memory) {
      capacity = 0;
      throw std::bad_alloc();
    }
  }
  template <class X>
  static size_t bytes(size_t count) {
    return (count * sizeof(X) + 63) / 64 * 64;
  }
};
