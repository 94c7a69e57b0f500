// What the thread sanitizer is not to report: Debian's RocksDB is not instrumented, so that its own lock-free
// structures look like races.
extern "C" const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() { return "race:librocksdb.so\n"; }
