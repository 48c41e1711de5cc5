// Package figures measures the daemon as a whole process: memory, processor
// time, answers a second, and what its callers see when the server stops.
//
// It has benchmarks only (make figures). They build the daemon as it is
// shipped and run it under the embedded server, which is in the process of
// the benchmark; callers are processes of their own. When SPIRE_BIN_DIR names
// a folder with spire-agent, the same is done with that right after.
//
// Both have their default settings, but for room in the cache and the delay
// before a wave: renewd hashes its callers' executables (unix:sha256), and
// spire-agent does not.
//
// Processor time is read from the process's own clock (clock_getcpuclockid(3)):
// to the nanosecond, and with the threads that have ended. MB are 10^6 bytes.
package figures
