// Package upstream is the client of the SPIRE Server API (spire-api-sdk
// v1.15.3): it bootstraps trust, proves the node, follows bundles and entries,
// and has SVIDs minted.
//
// # Connections
//
// A [Client] has one connection in use, bound to the identity that it
// presents. When the node's identity changes, the next call opens another
// connection; calls under way finish on the old one, which is then closed.
// That order is the server's demand: the first use of a renewed SVID retires
// the one before. A call that loses the race, and is refused because it used
// the retired one, is made once more on the new connection; a server refuses
// such a call before it does anything.
//
// A SPIRE server closes connections every 3 minutes. It says so first (HTTP/2
// GOAWAY), and gRPC itself moves the calls that the server has not begun to
// the next connection, so nothing here needs to repeat a call for that. For
// the same reason calls do not wait for a server that is down: they fail at
// once and are paced by whoever makes them, while gRPC looks for the server
// every 3 seconds at the most.
//
// There are no HTTP/2 keepalive pings, because a SPIRE server takes them for
// an attack (ENHANCE_YOUR_CALM, too_many_pings). A peer that vanished is
// noticed by TCP_USER_TIMEOUT, and one that hangs by the deadline of the call:
// the connection is replaced then.
//
// # Identity
//
// When the server says that it no longer knows the node (the details of
// PermissionDenied), or the own SVID has expired or lost its authority, the
// Client proves the node anew in the background, one attempt at a time with
// growing random pauses. Calls fail meanwhile, except for the bundle, which
// anybody may ask for. When the server says that the node is banned, the
// identity is wiped and everything fails with [ErrBanned].
package upstream
