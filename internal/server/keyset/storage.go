package keyset

import (
	"context"
	"errors"
	"time"
)

// ErrConflict is returned by [Storage.Save] when another writer was first.
var ErrConflict = errors.New("the stored keysets have changed")

// Document is the stored state of a deployment's keysets. It contains private keys.
type Document struct {
	// Version grows by one with each committed change; zero if nothing was ever
	// stored.
	Version uint64
	// Sequence is the trust bundle's sequence number. It grows by one with each
	// change of the bundle. An activation does not change the bundle.
	Sequence uint64
	// RotatedAt is when a keyset was last activated, or the first one was made.
	RotatedAt time.Time
	// Records are in order of issue.
	Records []Record
}

// Change is the record of one mutation in the audit log.
type Change struct {
	At        time.Time
	Actor     string // see [WithActor]
	Operation string // create, prepare, activate, taint, remove, restore, confirm clock
	KeysetID  string `json:",omitempty"` // empty for restore and confirm clock
	// Before and After are the states of all keysets, by ID.
	Before map[string]State `json:",omitempty"`
	After  map[string]State `json:",omitempty"`
	Note   string           `json:",omitempty"` // see [WithNote]; often empty
}

// Record is one stored keyset. The byte slices are never modified.
type Record struct {
	ID        string
	State     State
	IssuedAt  time.Time
	ExpiresAt time.Time
	// SteppedDownAt is when the keyset last stopped signing, because another
	// was activated by SteppedDownBy; zero and empty when it never signed, or
	// signs again.
	SteppedDownAt time.Time
	SteppedDownBy string
	TaintedAt     time.Time // zero when it is not tainted
	CA            []byte    // certificate, DER
	CAKey         []byte    // PKCS#8
	JWTKeyID      string
	JWTKey        []byte // PKCS#8
}

// Storage keeps one deployment's Document. It must be safe for concurrent use.
type Storage interface {
	// Load returns the Document that was saved last, or the zero Document.
	Load(ctx context.Context) (Document, error)
	// Save replaces the stored Document if its version is d.Version - 1, and adds
	// the change to the audit log, if there is one, in one atomic step. It returns
	// when that is durable. If the stored version differs, it changes nothing and
	// returns ErrConflict.
	Save(ctx context.Context, d Document, c Change) error
}
