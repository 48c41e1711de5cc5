// Package workload serves the SPIFFE Workload API on a Unix socket.
//
// A caller is the process at the other end of the connection, held by an
// [attest.Peer] from accept to close and attested anew at every call. What it
// is told comes from the cache in one consistent read. Each stream owns a
// wake-up channel, reads the state again when woken, and sends only what
// differs from what it sent last: the full set, no more often than every
// [PushSpacing], and always the last state.
//
// Status codes (SPIFFE Workload Endpoint, section 5, and what clients make of
// them): a caller is told PermissionDenied only when the agent knows that no
// entry matches it, because clients may drop their SVIDs on it. Whatever is
// temporary (starting, stopping, attestation failing, too many calls) is
// Unavailable, which clients retry. InvalidArgument is final.
package workload
