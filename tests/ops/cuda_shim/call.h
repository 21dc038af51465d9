// One call of a kernel by the tests: numbers and arrays from the files of a folder, results into the same folder.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "cuda_shim.h"

// An array as a device has it: aligned to 256 bytes, and not a byte longer than it must be.
template <typename T>
class Array {
 public:
  explicit Array(size_t count) : count_(count) {
    const size_t bytes = count * sizeof(T);
    if (posix_memalign(reinterpret_cast<void**>(&data_), 256, bytes > 0 ? bytes : 1) != 0) {
      cuda_shim::fail("no memory");
    }
    std::memset(static_cast<void*>(data_), 0, bytes);
  }
  Array(Array&& other) noexcept : data_(other.data_), count_(other.count_) { other.data_ = nullptr; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(data_); }

  T* data() const { return data_; }
  size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

class Call {
 public:
  explicit Call(const char* folder) : folder_(folder) {
    std::ifstream file(folder_ + "/call.txt");
    for (std::string name, value; file >> name >> value;) {
      values_[name] = value;
    }
    cuda_shim::set_seed(static_cast<uint64_t>(integer("seed")));
  }

  ~Call() {
    const cuda_shim::Traffic traffic = cuda_shim::traffic();
    std::ofstream(folder_ + "/traffic.txt") << traffic.sectors << " " << traffic.least << "\n";
  }

  const std::string& word(const std::string& name) const {
    const auto found = values_.find(name);
    if (found == values_.end()) {
      cuda_shim::fail(("call.txt has no " + name).c_str());
    }
    return found->second;
  }
  int64_t integer(const std::string& name) const { return std::stoll(word(name)); }
  double number(const std::string& name) const { return std::stod(word(name)); }

  template <typename T>
  Array<T> array(const std::string& name) const {
    std::ifstream file(folder_ + "/" + name + ".bin", std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    Array<T> result(bytes.size() / sizeof(T));
    std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(result.data()));
    return result;
  }

  template <typename T>
  void write(const std::string& name, const Array<T>& array) const {
    std::ofstream(folder_ + "/" + name + ".bin", std::ios::binary)
        .write(reinterpret_cast<const char*>(array.data()), static_cast<std::streamsize>(array.size() * sizeof(T)));
  }

 private:
  std::string folder_;
  std::map<std::string, std::string> values_;
};
