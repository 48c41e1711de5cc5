// Package system holds the tests of the whole system as an operator has it:
// the real commands as processes, real sockets and files, workloads that call
// each other all the time, and where SPIRE_BIN_DIR and Debian's prometheus are
// there, a real SPIRE server and a real Prometheus.
package system
