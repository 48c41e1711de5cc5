// Package figures measures the daemon as a process: memory, processor time, answers a
// second, and the effect of a stopped server on its callers.
//
// It has benchmarks only (make figures). They build the daemon as it is released and run
// it with the embedded server, which is in the benchmark's process. Callers are separate
// processes. With SPIRE_BIN_DIR, a folder with spire-agent, they measure that as well.
//
// Both have their default settings, except for the size of the cache and the delay before
// a wave. renewd hashes its callers' executables (unix:sha256), spire-agent does not.
//
// Processor time is read from the process's own clock (clock_getcpuclockid(3)):
// to the nanosecond, and with the threads that have ended. MB are 10^6 bytes.
package figures
