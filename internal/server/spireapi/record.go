package spireapi

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/ledger"
)

// Ledger records every SVID before it is sent, and the agents' reports on those
// that they hold; a *[ledger.Ledger] is one. It must be safe for concurrent use.
//
// Every call that signs follows this order: Begin, sign, Record…, answer, end. So
// at any time the ledger knows every SVID that an agent could have, and how many
// signatures are in flight. If Record… fails, the SVID is not sent.
type Ledger interface {
	// Begin announces a signature with the keyset that is active now or later,
	// until end is called.
	Begin() (end func())
	// RecordX509 and RecordJWT return when it is durable that the SVIDs may be
	// held.
	RecordX509(ctx context.Context, rows ...ledger.Row) error
	RecordJWT(ctx context.Context, keyID string, expiresAt time.Time) error
	// RecordWith is RecordX509 for a row that store makes durable together with
	// other data; see [ledger.Ledger.RecordWith].
	RecordWith(ctx context.Context, r ledger.Row, store func(ctx context.Context, add func() ledger.Row) error) error
	// Report stores an agent's report on the SVIDs that it holds.
	Report(ctx context.Context, agent string, r ledger.Report) error
	// Applied stores that an agent was in contact and the sequence number of the
	// bundle that it applies; zero if it did not say.
	Applied(agent string, sequence uint64)
	// Knows reports whether the ledger has data of an agent.
	Knows(agent string) bool
	// RemoveAgent removes the rows of an agent whose node no longer exists.
	RemoveAgent(ctx context.Context, agent string) error
}

// recordError logs an error of the ledger and returns the error for the caller.
func (s *Server) recordError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	s.log.Error("ledger not written, SVIDs not sent", "error", err)
	return status.Error(codes.Unavailable, "failed to record the SVIDs")
}
