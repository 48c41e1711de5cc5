// Package workload serves the SPIFFE Workload API on a Unix socket.
//
// A caller is the process at the other end of the connection. An [attest.Peer]
// holds it from accept to close, and every call attests it again. An answer comes
// from the cache in one consistent read. Each stream owns a wake-up channel. When
// woken it reads the current state and sends the full set if that differs from the
// last answer, with at least [PushSpacing] between two answers.
//
// Status codes (SPIFFE Workload Endpoint, section 5, and the practice of clients):
// PermissionDenied means that the agent knows that no entry matches, because clients
// may drop their SVIDs on it. Temporary conditions (starting, stopping, failed
// attestation, too many calls) are Unavailable, which clients retry.
// InvalidArgument is final.
package workload
