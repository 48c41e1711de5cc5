// Package listen serves the network listeners of the signing side. It limits the
// connections of the process, of each client and of each caller, with separate limits
// for anonymous callers, and the calls in flight. It serves gRPC and HTTP within these
// limits and shuts down in order.
package listen
