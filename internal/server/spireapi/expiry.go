package spireapi

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/keyset"
)

const (
	// retention is how long an agent whose SVID has expired is kept. No SVID lives
	// longer, so nothing that was issued to the agent is valid after that.
	retention = keyset.MaxX509TTL
	// tokenRetention is how long a join token is kept after its ExpiresAt, whether it was
	// spent or not: a node that still presents it learns which.
	tokenRetention = 7 * 24 * time.Hour
	// sweepSize is how many agents and tokens one sweep checks: more than are
	// added between two sweeps, and few enough commits for a caller to wait for.
	sweepSize = 10
	// sweepRetry is the delay after a deletion that failed.
	sweepRetry = time.Hour
)

// expiry is when a join token, or an agent, can be deleted. That of an agent
// follows from its first SVID, and is corrected when it is reached.
type expiry struct {
	at    time.Time
	token string
	agent spiffeid.ID // zero for a token
}

// expiries is a heap with the earliest first.
type expiries []expiry

func (e expiries) Len() int           { return len(e) }
func (e expiries) Less(i, j int) bool { return e[i].at.Before(e[j].at) }
func (e expiries) Swap(i, j int)      { e[i], e[j] = e[j], e[i] }
func (e *expiries) Push(x any)        { *e = append(*e, x.(expiry)) }
func (e *expiries) Pop() any {
	last := len(*e) - 1
	x := (*e)[last]
	*e = (*e)[:last]
	return x
}

func (s *Server) loadExpiries(ctx context.Context) error {
	tokens, err := s.storage.Tokens(ctx)
	if err != nil {
		return fmt.Errorf("load join tokens: %w", err)
	}
	for _, t := range tokens {
		s.addExpiry(expiry{at: t.ExpiresAt.Add(tokenRetention), token: t.Value})
	}
	agents, err := s.storage.Agents(ctx)
	if err != nil {
		return fmt.Errorf("load agents: %w", err)
	}
	for _, a := range agents {
		s.addExpiry(expiry{at: a.deletableAt(), agent: a.ID})
	}
	return nil
}

func (s *Server) addExpiry(e expiry) {
	s.expiriesMu.Lock()
	defer s.expiriesMu.Unlock()
	heap.Push(&s.expiries, e)
}

// sweep deletes join tokens and agents after their retention. Banned
// agents are kept. It runs whenever a join token is made and whenever a node attests
// without one: so storage does not grow without bound, and no task has to scan all of it.
func (s *Server) sweep(ctx context.Context) {
	for range sweepSize {
		e, ok := s.popExpired()
		if !ok {
			return
		}
		again, err := s.deleteExpired(ctx, e)
		if err != nil {
			// Retried later, so that it does not block the others.
			e.at = s.config.AtLeast().Add(sweepRetry)
			s.addExpiry(e)
			s.log.Warn("expired agent or join token not deleted", "error", err, "delay", sweepRetry)
			return
		}
		if !again.IsZero() {
			e.at = again
			s.addExpiry(e)
		}
	}
}

func (s *Server) popExpired() (expiry, bool) {
	s.expiriesMu.Lock()
	defer s.expiriesMu.Unlock()
	if len(s.expiries) == 0 || !s.expiries[0].at.Before(s.config.AtLeast()) {
		return expiry{}, false
	}
	return heap.Pop(&s.expiries).(expiry), true
}

// deleteExpired deletes a token or an agent. If the agent has renewed its SVID, it
// returns when the agent can be deleted instead.
func (s *Server) deleteExpired(ctx context.Context, e expiry) (again time.Time, err error) {
	if e.agent.IsZero() {
		// ErrNotFound: a sweep before has deleted it, and its answer was lost.
		if _, err := s.storage.TakeToken(ctx, e.token); err != nil && !errors.Is(err, ErrNotFound) {
			return time.Time{}, fmt.Errorf("delete join token: %w", err)
		}
		return time.Time{}, nil
	}
	agent, err := s.storage.Agent(ctx, e.agent)
	switch {
	case err != nil:
		return time.Time{}, fmt.Errorf("look up agent: %w", err)
	case agent == nil || agent.Banned:
		return time.Time{}, nil
	case !agent.deletableAt().Before(s.config.AtLeast()):
		return agent.deletableAt(), nil
	}
	_, err = s.storage.UpdateAgent(ctx, e.agent, func(a *Agent) (*Agent, error) {
		// Checked again: it may have been banned, or have attested again.
		if a != nil && (a.Banned || !a.deletableAt().Before(s.config.AtLeast())) {
			return a, nil
		}
		return nil, nil
	})
	if err != nil {
		return time.Time{}, fmt.Errorf("delete agent: %w", err)
	}
	s.log.Info("expired agent deleted", "agent_id", e.agent.String())
	return time.Time{}, nil
}

func (a *Agent) deletableAt() time.Time {
	end := a.ExpiresAt
	if a.NextSerial != "" && a.NextExpiresAt.After(end) {
		end = a.NextExpiresAt
	}
	return end.Add(retention)
}
