// Package node proves to the server which node this is, and keeps the agent
// SVID.
//
// A [Node] holds one [Identity] at a time. [Node.Attest] gets the first one by
// proving the node through an [Attestor]; [Node.Renew] replaces it while it is
// still accepted. What the server answers is verified, then written to the
// [Store], and only then used. The order matters: a join token is gone once
// the server has read it, so an identity that exists in memory only would be
// lost with the process. What cannot be written all the same is tried again
// until it is on disk.
//
// The package does not connect to anything: the caller passes a connection
// and answers for the server at its other end being authenticated.
package node
