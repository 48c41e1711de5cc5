// Package runbooktest is a signing server for tests of operators' commands: real keysets
// in memory, and agents whose state the test sets.
package runbooktest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/test/memory"
)

// Server implements [runbook.Backend]. Its fields may be changed between calls
// and by Before, not during one.
type Server struct {
	Deployment *keyset.Deployment

	// Before is called at the beginning of each call with its name and keyset ID. Its
	// error is the call's. It may be nil.
	Before func(call, id string) error
	// After is called after each mutation. Its error replaces the result. It may be
	// nil.
	After func(call, id string) error

	// HoldersAt returns the agents that hold SVIDs of a keyset; nil: none. Their SVIDs
	// are the live ones.
	HoldersAt func(id string, now time.Time) []runbook.Holder
	// JWTExpiry of each keyset by ID; absent: no JWT-SVID was ever signed.
	JWTExpiry map[string]time.Time
	// Unknown says why the figures are not known. It is empty if they are.
	Unknown string
	// Agents counts the agents, Behind those that are behind; nil: none.
	Agents int
	Behind func(now time.Time) int

	mu    sync.Mutex
	calls []string
}

// NewServer opens a deployment called default of example.org, with its first
// keyset.
func NewServer(t testing.TB) *Server {
	t.Helper()
	d, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Storage: new(memory.Keysets)})
	if err != nil {
		t.Fatal(err)
	}
	return &Server{Deployment: d, JWTExpiry: map[string]time.Time{}}
}

// Calls returns the mutations that were called, in order: "prepare", "activate ks_…"
// and so on.
func (s *Server) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.calls...)
}

func (s *Server) before(call, id string) error {
	if s.Before != nil {
		return s.Before(call, id)
	}
	return nil
}

func (s *Server) mutate(call, id string, f func() error) error {
	s.mu.Lock()
	entry := call
	if id != "" {
		entry += " " + id
	}
	s.calls = append(s.calls, entry)
	s.mu.Unlock()
	if err := s.before(call, id); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	if s.After != nil {
		return s.After(call, id)
	}
	return nil
}

// Status implements [runbook.Backend].
func (s *Server) Status(ctx context.Context) (runbook.Status, error) {
	if err := s.before("status", ""); err != nil {
		return runbook.Status{}, err
	}
	keysets, err := s.Deployment.List(ctx)
	if err != nil {
		return runbook.Status{}, err
	}
	now := time.Now()
	out := runbook.Status{TrustDomain: "example.org", Deployment: s.Deployment.Name(), Sequence: s.Deployment.Bundle().Sequence, Agents: s.Agents}
	if s.Behind != nil {
		out.AgentsBehind = s.Behind(now)
	}
	for _, k := range keysets {
		out.Keysets = append(out.Keysets, s.keyset(k, now))
	}
	return out, nil
}

func (s *Server) keyset(k keyset.Keyset, now time.Time) runbook.Keyset {
	out := runbook.Keyset{
		ID: k.ID, IssuedAt: k.IssuedAt, ExpiresAt: k.ExpiresAt, X509AuthorityID: k.X509AuthorityID, JWTKeyID: k.JWTKeyID,
		TaintedAt: k.TaintedAt, SteppedDown: !k.SteppedDownAt.IsZero(),
		State: map[keyset.State]runbook.State{
			keyset.Prepared: runbook.Prepared, keyset.Active: runbook.Active, keyset.Tainted: runbook.Tainted,
		}[k.State],
		JWTExpiry: s.JWTExpiry[k.ID], Unknown: s.Unknown,
	}
	if s.HoldersAt != nil {
		for _, h := range s.HoldersAt(k.ID, now) {
			out.X509SVIDs += h.SVIDs
		}
	}
	if s.Unknown != "" {
		out.X509SVIDs = -1
		return out
	}
	out.X509Safe = k.State == keyset.Tainted && (s.HoldersAt == nil || len(s.HoldersAt(k.ID, now)) == 0)
	out.JWTSafe = k.State == keyset.Tainted && !out.JWTExpiry.After(now)
	return out
}

// Holders implements [runbook.Backend].
func (s *Server) Holders(_ context.Context, id string) ([]runbook.Holder, error) {
	if err := s.before("holders", id); err != nil {
		return nil, err
	}
	if s.Unknown != "" {
		return nil, errors.New(s.Unknown)
	}
	if s.HoldersAt == nil {
		return nil, nil
	}
	return s.HoldersAt(id, time.Now()), nil
}

// Prepare implements [runbook.Backend].
func (s *Server) Prepare(ctx context.Context) (out runbook.Keyset, err error) {
	err = s.mutate("prepare", "", func() error {
		k, err := s.Deployment.Prepare(ctx)
		out = s.keyset(k, time.Now())
		return err
	})
	if err != nil {
		return runbook.Keyset{}, err
	}
	return out, nil
}

// Activate implements [runbook.Backend].
func (s *Server) Activate(ctx context.Context, id string) error {
	return s.mutate("activate", id, func() error { return s.Deployment.Activate(ctx, id) })
}

// Taint implements [runbook.Backend].
func (s *Server) Taint(ctx context.Context, id string) error {
	return s.mutate("taint", id, func() error { return s.Deployment.Taint(ctx, id) })
}

// Remove implements [runbook.Backend].
func (s *Server) Remove(ctx context.Context, id string, force bool) error {
	return s.mutate("remove", id, func() error {
		status, err := s.Status(ctx)
		if err != nil {
			return err
		}
		for _, k := range status.Keysets {
			if k.ID == id && k.State == runbook.Tainted && !k.X509Safe && !force {
				return &runbook.NotSafeError{Keyset: id, Message: "X.509-SVIDs depend on it"}
			}
		}
		return s.Deployment.Remove(ctx, id)
	})
}
