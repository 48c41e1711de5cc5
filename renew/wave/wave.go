// Package wave computes how long a node waits after a taint and how fast it renews. The
// agent and an operator's plan both use it, so the two cannot differ.
package wave

import (
	"crypto/sha256"
	"encoding/binary"
	"math/bits"
	"time"
)

// The defaults of a node.
const (
	DefaultMaxDelay = 60 * time.Second
	DefaultRate     = 20 // renewals a second
)

// Delay returns how long a node waits after the taint of an authority: uniform in
// [0, limit) over all seeds. It is computed from the node's random seed and not drawn, so
// that it is the same after a restart and different for each node and each taint.
func Delay(seed [32]byte, authorityID string, limit time.Duration) time.Duration {
	h := sha256.New()
	h.Write(seed[:])
	h.Write([]byte(authorityID))
	r := binary.BigEndian.Uint64(h.Sum(nil))
	// The high half of r * limit is r / 2^64 of limit, without rounding up.
	hi, _ := bits.Mul64(r, uint64(max(limit, 0)))
	return time.Duration(hi)
}
