package runbook

import (
	"cmp"
	"fmt"
	"strings"
	"time"
)

// Removed is the state of a [Member] whose key is removed, while other servers still have
// theirs.
const Removed State = "Removed"

// Member is the key of a keyset at one server of a cluster.
type Member struct {
	Server string `json:"server"`
	Keyset
}

// Authority is an authority in the trust bundle that is not part of a keyset.
type Authority struct {
	Type      string    `json:"type"` // X.509 or JWT
	ID        string    `json:"id"`
	Tainted   bool      `json:"tainted"`
	ExpiresAt time.Time `json:"expires_at"`
}

// Matches reports whether id is the authority's ID, or the ID of a keyset that begins with
// it.
func (a Authority) Matches(id string) bool {
	start, ofKeyset := strings.CutPrefix(id, "ks_")
	return id == a.ID || (ofKeyset && start != "" && strings.HasPrefix(a.ID, start))
}

// String describes the authority in a sentence. [UnownedMeaning] says what it means.
func (a Authority) String() string {
	state := ""
	if a.Tainted {
		state = ", tainted"
	}
	return fmt.Sprintf("In the bundle, of no given server: %s authority %s%s, until %s.", a.Type, a.ID, state, formatTime(a.ExpiresAt))
}

// UnownedMeaning says what an authority of no given server means, and the remedy.
const UnownedMeaning = "The server of such an authority was not given, was replaced by one with other keys, prepared twice, or is a nested one (JWT only). Give all servers of the cluster. " +
	"An authority whose server is gone stays in the bundle until it expires, and what it signed stays valid."

// UnreachableError says that some servers of a cluster do not answer. A [Backend.Status]
// that returns it has what the other servers know, which is no base for a step.
type UnreachableError struct {
	Servers int   // of the cluster
	Err     error // names the servers that do not answer
}

// Error implements error.
func (e *UnreachableError) Error() string {
	return fmt.Sprintf("not all of the %d servers answer: %v", e.Servers, e.Err)
}

// Unwrap returns the errors of the servers.
func (e *UnreachableError) Unwrap() error { return e.Err }

// Add adds the figures of a member to those of the keyset: the sum, the latest expiry, and
// safe only if all are. Unknown of one member is unknown of all.
func (k *Keyset) Add(m Keyset) {
	if k.X509SVIDs < 0 || m.X509SVIDs < 0 {
		k.X509SVIDs = -1
	} else {
		k.X509SVIDs += m.X509SVIDs
	}
	if m.JWTExpiry.After(k.JWTExpiry) {
		k.JWTExpiry = m.JWTExpiry
	}
	k.X509Safe, k.JWTSafe = k.X509Safe && m.X509Safe, k.JWTSafe && m.JWTSafe
	k.Unknown, k.Unknowable = cmp.Or(k.Unknown, m.Unknown), k.Unknowable || m.Unknowable
}

// is reports whether id names the keyset or one of its members.
func (k Keyset) is(id string) bool {
	if k.ID == id {
		return true
	}
	for _, m := range k.Members {
		if m.ID == id {
			return true
		}
	}
	return false
}
