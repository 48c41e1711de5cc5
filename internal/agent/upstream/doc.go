// Package upstream is the client of the SPIRE Server API (spire-api-sdk
// v1.15.3): it bootstraps trust, attests the node, fetches bundles and entries,
// and requests SVIDs.
//
// # Connections
//
// A [Client] uses one connection, which presents one identity. When the identity
// changes, the next call opens another connection; calls in flight finish on the
// old one, which is then closed. The server revokes the old SVID at the first use
// of a renewed one. A call in flight that is refused for that reason is made once
// more on the new connection; the server refuses such a call before it executes
// anything.
//
// A SPIRE server closes connections every 3 minutes. It sends GOAWAY (HTTP/2) first,
// and gRPC moves the calls that the server has not started to the next connection,
// so the Client need not repeat them. Calls fail at once while the server is down;
// the caller paces them. gRPC tries to reconnect at least every 3 seconds.
//
// The Client sends no HTTP/2 keepalive pings, because a SPIRE server takes them for
// an attack (ENHANCE_YOUR_CALM, too_many_pings). TCP_USER_TIMEOUT ends the connection
// to a peer that vanished. When a call reaches its deadline, the Client replaces the
// connection.
//
// # Identity
//
// The Client re-attests the node when the server no longer knows it (the details of
// PermissionDenied), when the agent SVID has expired, or when its authority was
// removed. It does so in the background, one attempt at a time with growing random
// pauses. Calls fail meanwhile, except FetchBundle, which needs no identity. When
// the server has banned the node, the identity is wiped and every call fails with
// [ErrBanned].
package upstream
