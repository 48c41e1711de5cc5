package spireapi

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/ledger"
)

// Ledger learns of every SVID before it is handed out, and what agents say
// about those that they hold; a *[ledger.Ledger] is one. It must be safe for
// concurrent use.
//
// Every call that signs does it in this order: Begin, sign, Give…, answer, end.
// So the ledger knows, at any time, of every SVID that somebody could have, and
// of signatures that it has not been told about yet. When Give… fails
// nothing is handed out.
type Ledger interface {
	// Begin says that something may be signed, with what is the active keyset
	// now or later, until end is called.
	Begin() (end func())
	// GiveX509 and GiveJWT return when it is durable that the SVIDs may be held.
	GiveX509(ctx context.Context, rows ...ledger.Row) error
	GiveJWT(ctx context.Context, keyID string, expiresAt time.Time) error
	// GiveWith is GiveX509 for a row that store makes durable together with something
	// else; see [ledger.Ledger.GiveWith].
	GiveWith(ctx context.Context, r ledger.Row, store func(ctx context.Context, give func() ledger.Row) error) error
	// Report takes an agent's word on what it holds.
	Report(ctx context.Context, agent string, r ledger.Report) error
	// Applied takes an agent's word on the bundle that it applies; zero: it has been
	// heard of, and does not say.
	Applied(agent string, sequence uint64)
	// Knows reports whether there is anything of an agent.
	Knows(agent string) bool
	// Gone takes an operator's word that the agent's node does not exist.
	Gone(ctx context.Context, agent string) error
}

// unrecorded is what a caller is told when the ledger could not be written.
func (s *Server) unrecorded(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	s.log.Error("ledger could not be written: nothing is handed out", "error", err)
	return status.Error(codes.Unavailable, "failed to record what was signed")
}

// noLedger is the Ledger of a server without one.
type noLedger struct{}

func (noLedger) Begin() func()                                 { return func() {} }
func (noLedger) GiveX509(context.Context, ...ledger.Row) error { return nil }
func (noLedger) GiveWith(ctx context.Context, r ledger.Row, store func(context.Context, func() ledger.Row) error) error {
	return store(ctx, func() ledger.Row { return r })
}
func (noLedger) GiveJWT(context.Context, string, time.Time) error    { return nil }
func (noLedger) Report(context.Context, string, ledger.Report) error { return nil }
func (noLedger) Applied(string, uint64)                              {}
func (noLedger) Knows(string) bool                                   { return false }
func (noLedger) Gone(context.Context, string) error                  { return nil }
