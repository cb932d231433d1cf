// Whether modules still are as they were: their classes, and what is in their dictionaries, object
// by object. fused_resnet/modules/guard.py makes a guard and keeps what it refers to alive.
//
// What it needs of CPython is in the limited API and handed over as addresses, so that this library
// loads where there is no Python. `fused_resnet_modules_are_same` is called through ctypes, which
// keeps the interpreter's lock; the dispatcher would give it back.
#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "checks.h"

namespace fused_resnet {
namespace {

using Object = void*;

struct Interpreter {
  Object (*type_of)(Object);                              // PyObject_Type: a reference of ours
  Object (*dict_of)(Object, void*);                       // PyObject_GenericGetDict: likewise
  void (*release)(Object);                                // Py_DecRef
  int (*next)(Object, ptrdiff_t*, Object* key, Object*);  // PyDict_Next: borrowed
  ptrdiff_t (*size)(Object);                              // PyDict_Size
};

struct Module {
  Object module, type, dict;
};

struct Entry {
  Object key, value;
};

struct Dict {
  Object dict;
  size_t end;  // of its entries among all
};

struct Guard {
  Interpreter python;
  std::vector<Module> modules;
  std::vector<Dict> dicts;
  std::vector<Entry> entries;
  std::vector<Object> empty;

  bool has(Object owned, Object expected) const {
    if (owned != nullptr) python.release(owned);
    return owned == expected;
  }

  bool holds() const {
    for (const Module& module : modules) {
      if (!has(python.type_of(module.module), module.type) ||
          !has(python.dict_of(module.module, nullptr), module.dict)) {
        return false;
      }
    }
    size_t i = 0;
    for (const Dict& dict : dicts) {
      ptrdiff_t position = 0;
      for (Entry now; python.next(dict.dict, &position, &now.key, &now.value); ++i) {
        if (i == dict.end || now.key != entries[i].key || now.value != entries[i].value) {
          return false;
        }
      }
      if (i != dict.end) return false;
    }
    for (const Object dict : empty) {
      if (python.size(dict) != 0) return false;
    }
    return true;
  }
};

std::mutex guards_mutex;
std::unordered_map<int64_t, std::unique_ptr<Guard>> guards;

template <class T>
T address(int64_t number) {
  FR_CHECK(number != 0, "make_module_guard: an address is 0");
  return reinterpret_cast<T>(number);
}

// Addresses all: `functions` in the order of `Interpreter`; of each of `modules` itself, its class
// and its dictionary; of `dicts` each and how many entries it has; of `entries` key and value, in
// the order of the dictionaries; of dictionaries that must be empty.
int64_t make_module_guard(std::vector<int64_t> functions, std::vector<int64_t> modules,
                          std::vector<int64_t> dicts, std::vector<int64_t> entries,
                          std::vector<int64_t> empty) {
  FR_CHECK(functions.size() == 5 && modules.size() % 3 == 0 && dicts.size() % 2 == 0 &&
               entries.size() % 2 == 0,
           "make_module_guard: ", functions.size(), " functions, ", modules.size(),
           " numbers for modules, ", dicts.size(), " for dictionaries, ", entries.size(),
           " for entries");
  auto guard = std::make_unique<Guard>();
  Interpreter& python = guard->python;
  python.type_of = address<decltype(python.type_of)>(functions[0]);
  python.dict_of = address<decltype(python.dict_of)>(functions[1]);
  python.release = address<decltype(python.release)>(functions[2]);
  python.next = address<decltype(python.next)>(functions[3]);
  python.size = address<decltype(python.size)>(functions[4]);
  for (size_t i = 0; i < modules.size(); i += 3) {
    guard->modules.push_back({address<Object>(modules[i]), address<Object>(modules[i + 1]),
                              address<Object>(modules[i + 2])});
  }
  for (size_t i = 0; i < entries.size(); i += 2) {
    guard->entries.push_back({address<Object>(entries[i]), address<Object>(entries[i + 1])});
  }
  size_t end = 0;
  for (size_t i = 0; i < dicts.size(); i += 2) {
    end += static_cast<size_t>(dicts[i + 1]);
    guard->dicts.push_back({address<Object>(dicts[i]), end});
  }
  FR_CHECK(end == guard->entries.size(), "make_module_guard: ", guard->entries.size(),
           " entries, the dictionaries have ", end);
  for (const int64_t dict : empty) guard->empty.push_back(address<Object>(dict));
  const auto number = reinterpret_cast<int64_t>(guard.get());
  const std::lock_guard lock(guards_mutex);
  guards[number] = std::move(guard);
  return number;
}

void free_module_guard(int64_t number) {
  const std::lock_guard lock(guards_mutex);
  guards.erase(number);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m)
{
  m.impl("make_module_guard", TORCH_BOX(&make_module_guard));
  m.impl("free_module_guard", TORCH_BOX(&free_module_guard));
}

}  // namespace fused_resnet

// Of a guard that has not been freed, by a thread that holds the interpreter's lock.
extern "C" __attribute__((visibility("default"))) int fused_resnet_modules_are_same(int64_t guard) {
  return reinterpret_cast<const fused_resnet::Guard*>(guard)->holds();
}
