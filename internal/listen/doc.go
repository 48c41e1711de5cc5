// Package listen owns what everybody can reach: the listeners of the signing side.
// It bounds the connections of the process, of each client and of each caller,
// differently before and after a caller is known, and the calls that they have in
// flight; it serves gRPC within these bounds and ends in order; and it writes what
// strangers cause to the log without letting them fill it.
package listen
