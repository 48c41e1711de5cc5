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

	"github.com/renewd/renewd/internal/server/keyset"
)

// CreateJoinToken makes a token with which one agent can attest, once, within ttl.
// The agent's ID will be spiffe://<trust domain>/spire/agent/join_token/<token>:
// the token is no longer a secret once it has been used. The agent gets the label, which
// may be empty.
func (s *Server) CreateJoinToken(ctx context.Context, ttl time.Duration, label string) (Token, error) {
	if ttl <= 0 {
		return Token{}, fmt.Errorf("create join token: lifetime %v is not positive", ttl)
	}
	now := s.now().UTC()
	t := Token{Value: rand.Text(), ExpiresAt: now.Add(ttl), Label: label}
	record := &AuditRecord{
		At: now, Actor: keyset.Actor(ctx), Operation: CreateToken, Note: keyset.Note(ctx), Token: &AuditToken{Label: label, ExpiresAt: t.ExpiresAt},
	}
	if err := s.storage.PutToken(ctx, t, record); err != nil {
		return Token{}, fmt.Errorf("create join token: %w", err)
	}
	s.addExpiry(expiry{at: t.ExpiresAt.Add(tokenRetention), token: t.Value})
	s.sweep(ctx)
	return t, nil
}

// Agents returns all agents, ordered by ID, including those that are banned or
// whose SVID has expired and that are not yet deleted.
func (s *Server) Agents(ctx context.Context) ([]Agent, error) {
	agents, err := s.storage.Agents(ctx)
	if err != nil {
		return nil, fmt.Errorf("list agents: %w", err)
	}
	slices.SortFunc(agents, func(a, b Agent) int { return cmp.Compare(a.ID.String(), b.ID.String()) })
	return agents, nil
}

// auditAgent returns the record of the audit log for a change of an agent.
func (s *Server) auditAgent(ctx context.Context, operation string, id spiffeid.ID) *AuditRecord {
	return &AuditRecord{At: s.now().UTC(), Actor: keyset.Actor(ctx), Operation: operation, Note: keyset.Note(ctx), Agent: &AgentChange{ID: id.String()}}
}

// The states of an agent in the audit log.
const (
	stateAttested = "attested"
	stateBanned   = "banned"
)

// setBefore records what is known of an agent before the change.
func (c *AgentChange) setBefore(a *Agent) {
	c.Hostname, c.Label, c.Before = a.Hostname, a.Label, stateAttested
	if a.Banned {
		c.Before = stateBanned
	}
}

// errBanned ends the ban of an agent that is banned: nothing changes.
var errBanned = errors.New("banned before")

// BanAgent bans an agent: all its calls are refused until it is evicted. It returns
// ErrNotFound for an agent that is not attested.
func (s *Server) BanAgent(ctx context.Context, id spiffeid.ID) error {
	record := s.auditAgent(ctx, BanAgent, id)
	_, err := s.storage.UpdateAgent(ctx, id, func(a *Agent) (*Agent, error) {
		switch {
		case a == nil:
			return nil, ErrNotFound
		case a.Banned:
			return nil, errBanned
		}
		record.Agent.setBefore(a)
		record.Agent.After = stateBanned
		a.Banned, a.Serial, a.NextSerial = true, "", ""
		return a, nil
	}, record)
	if errors.Is(err, errBanned) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ban agent %s: %w", id, err)
	}
	s.log.Info("agent banned", "agent_id", id.String())
	return nil
}

// EvictAgent deletes an agent, banned or not: it has to attest again. It returns
// ErrNotFound for an agent that is not attested.
//
// SVIDs that were issued to the agent count in the ledger until they expire. With
// gone, by which the operator confirms that the node no longer exists, they are
// removed from the ledger. An agent that was evicted before may still be in the
// ledger: with gone, ErrNotFound is returned only if it is in neither place.
func (s *Server) EvictAgent(ctx context.Context, id spiffeid.ID, gone bool) error {
	record := s.auditAgent(ctx, EvictAgent, id)
	record.Agent.Gone = gone
	evictedBefore := gone && s.ledger.Knows(id.String())
	_, err := s.storage.UpdateAgent(ctx, id, func(a *Agent) (*Agent, error) {
		switch {
		case a != nil:
			record.Agent.setBefore(a)
		case !evictedBefore:
			return nil, ErrNotFound
		}
		return nil, nil
	}, record)
	if err != nil {
		return fmt.Errorf("evict agent %s: %w", id, err)
	}
	if gone {
		if err := s.ledger.RemoveAgent(ctx, id.String()); err != nil {
			return fmt.Errorf("evict agent %s: the agent is evicted, but its SVIDs are still counted: %w", id, err)
		}
	}
	s.log.Info("agent evicted", "agent_id", id.String(), "gone", gone)
	return nil
}
