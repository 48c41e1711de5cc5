// Package node attests the node to the server, and stores the agent SVID.
//
// A [Node] holds one [Identity] at a time. [Node.Attest] obtains the first one
// through an [Attestor]; [Node.Renew] replaces it while the server accepts it. A new
// identity is verified, then written to the [Store], and only then used. The order
// matters: the server accepts a join token once, so an identity that exists in
// memory only would be lost with the process. The Store retries failed writes.
//
// The package opens no connections to the server. The caller passes one on which it
// has authenticated the server.
package node
