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
	// forgetAfter is how long an agent whose SVID has expired is kept. As no
	// SVID lives longer, nothing that it was given is valid after that.
	forgetAfter = keyset.MaxX509TTL
	// sweepSize is the most that one sweep looks at: more than what is added
	// between two of them, and few enough commits for somebody to wait for.
	sweepSize = 10
	// sweepPause is when what could not be forgotten is tried again.
	sweepPause = time.Hour
)

// expiry is a join token, or an agent, that can be forgotten at a time. An agent
// is known by when its first SVID ends and looked at again then.
type expiry struct {
	at    time.Time
	token string
	agent spiffeid.ID // zero for a token
}

// expiries is a heap, the soonest first.
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
		s.remember(expiry{at: t.ExpiresAt, token: t.Value})
	}
	agents, err := s.storage.Agents(ctx)
	if err != nil {
		return fmt.Errorf("load agents: %w", err)
	}
	for _, a := range agents {
		s.remember(expiry{at: a.forgetAt(), agent: a.ID})
	}
	return nil
}

func (s *Server) remember(e expiry) {
	s.expiriesM.Lock()
	defer s.expiriesM.Unlock()
	heap.Push(&s.expiries, e)
}

// sweep forgets join tokens that have expired, and agents that expired so long
// ago that nothing depends on them; who is banned stays banned. It is done
// whenever a join token is made, because every agent costs one: so what is kept
// does not grow without end, and no task has to look at all of it.
func (s *Server) sweep(ctx context.Context) {
	for range sweepSize {
		e, ok := s.overdue()
		if !ok {
			return
		}
		again, err := s.forget(ctx, e)
		if err != nil {
			// Later, so that what cannot be deleted does not keep the rest.
			e.at = s.config.Sure().Add(sweepPause)
			s.remember(e)
			s.log.Warn("could not forget what has expired", "error", err, "again_in", sweepPause)
			return
		}
		if !again.IsZero() {
			e.at = again
			s.remember(e)
		}
	}
}

func (s *Server) overdue() (expiry, bool) {
	s.expiriesM.Lock()
	defer s.expiriesM.Unlock()
	if len(s.expiries) == 0 || !s.expiries[0].at.Before(s.config.Sure()) {
		return expiry{}, false
	}
	return heap.Pop(&s.expiries).(expiry), true
}

// forget deletes a token or an agent. It returns when to look at an agent
// again that has been renewed since.
func (s *Server) forget(ctx context.Context, e expiry) (again time.Time, err error) {
	if e.agent.IsZero() {
		// ErrNotFound: it has been used.
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
		return time.Time{}, nil // it need not be looked at again
	case !agent.forgetAt().Before(s.config.Sure()):
		return agent.forgetAt(), nil
	}
	_, err = s.storage.UpdateAgent(ctx, e.agent, func(a *Agent) (*Agent, error) {
		// Looked at again: it may have been banned, or attested anew.
		if a != nil && (a.Banned || !a.forgetAt().Before(s.config.Sure())) {
			return a, nil
		}
		return nil, nil
	})
	if err != nil {
		return time.Time{}, fmt.Errorf("delete agent: %w", err)
	}
	s.log.Info("agent forgotten: its SVID expired long ago", "agent_id", e.agent.String())
	return time.Time{}, nil
}

func (a *Agent) forgetAt() time.Time {
	end := a.ExpiresAt
	if a.NextSerial != "" && a.NextExpiresAt.After(end) {
		end = a.NextExpiresAt
	}
	return end.Add(forgetAfter)
}
