package spireapi

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// CreateJoinToken makes a token that lets one agent in, once, within ttl. The
// agent will be spiffe://<trust domain>/spire/agent/join_token/<token>: the
// token is no secret once it has been used.
func (s *Server) CreateJoinToken(ctx context.Context, ttl time.Duration) (Token, error) {
	if ttl <= 0 {
		return Token{}, fmt.Errorf("create join token: lifetime %v is not positive", ttl)
	}
	t := Token{Value: rand.Text(), ExpiresAt: s.now().Add(ttl)}
	if err := s.storage.PutToken(ctx, t); err != nil {
		return Token{}, fmt.Errorf("create join token: %w", err)
	}
	s.remember(expiry{at: t.ExpiresAt, token: t.Value})
	s.sweep(ctx)
	return t, nil
}

// Agents returns all agents, ordered by ID: also those that are banned or whose
// SVID has expired lately.
func (s *Server) Agents(ctx context.Context) ([]Agent, error) {
	agents, err := s.storage.Agents(ctx)
	if err != nil {
		return nil, fmt.Errorf("list agents: %w", err)
	}
	slices.SortFunc(agents, func(a, b Agent) int { return cmp.Compare(a.ID.String(), b.ID.String()) })
	return agents, nil
}

// BanAgent refuses an agent from now on and for good. It returns ErrNotFound
// for an agent that is not attested.
func (s *Server) BanAgent(ctx context.Context, id spiffeid.ID) error {
	_, err := s.storage.UpdateAgent(ctx, id, func(a *Agent) (*Agent, error) {
		if a == nil {
			return nil, ErrNotFound
		}
		a.Banned, a.Serial, a.NextSerial = true, "", ""
		return a, nil
	})
	if err != nil {
		return fmt.Errorf("ban agent %s: %w", id, err)
	}
	s.log.Info("agent banned", "agent_id", id.String())
	return nil
}

// EvictAgent forgets an agent, banned or not: it has to attest again. It
// returns ErrNotFound for an agent that is not attested.
//
// What it was given counts in the ledger until it expires, unless gone is the
// operator's word that the node no longer exists. With gone ErrNotFound is returned
// only when the ledger knows nothing of the agent either: it may have been evicted
// before.
func (s *Server) EvictAgent(ctx context.Context, id spiffeid.ID, gone bool) error {
	_, err := s.storage.UpdateAgent(ctx, id, func(a *Agent) (*Agent, error) {
		if a == nil {
			return nil, ErrNotFound
		}
		return nil, nil
	})
	forgotten := errors.Is(err, ErrNotFound) && gone && s.ledger.Knows(id.String())
	if err != nil && !forgotten {
		return fmt.Errorf("evict agent %s: %w", id, err)
	}
	if gone {
		if err := s.ledger.Gone(ctx, id.String()); err != nil {
			return fmt.Errorf("evict agent %s: it has to attest again, but what it was given is still counted: %w", id, err)
		}
	}
	s.log.Info("agent evicted", "agent_id", id.String(), "gone", gone)
	return nil
}
