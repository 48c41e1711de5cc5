package workload

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest"
)

// caller is the process behind one call, attested.
type caller struct {
	s         *Server
	peer      *attest.Peer
	selectors []cache.Selector
	// uncertain says that an attestor failed: selectors may be missing.
	uncertain bool
	needs     uint64 // Config.Needs before it was attested
	// reattest is when it may be attested again, after that took too long.
	reattest time.Time
}

const (
	// reattestWait is how long an open stream waits while its caller is attested
	// again: a large program takes seconds to hash, and a file system may hang.
	// Renewals must not wait for that.
	reattestWait = 5 * time.Second
	// reattestPause is how long it goes on with what is known of its caller after
	// that. What was begun is finished meanwhile and found.
	reattestPause = 30 * time.Second
)

// securityHeader keeps programs that were talked into sending a request (SSRF)
// from reaching the API: SPIFFE Workload Endpoint, section 6.
const securityHeader = "workload.spiffe.io"

var (
	errHeader   = status.Error(codes.InvalidArgument, "the request needs the metadata \"workload.spiffe.io: true\", once")
	errStarting = status.Error(codes.Unavailable, "the agent is starting: it has not heard from the server yet")
	errStopping = status.Error(codes.Unavailable, "the agent is stopping")
	errBusy     = status.Error(codes.Unavailable, "the processes of this user have too many calls open")
	errGone     = status.Error(codes.Unavailable, "the process that opened this connection has ended: open a new one")
	errAttest   = status.Error(codes.Unavailable, "the caller could not be attested: the agent's log says why")
	errDenied   = status.Error(codes.PermissionDenied, "no registration entry matches this process")
)

// enter lets a call in: checks its header, attests the caller and counts the
// call. The caller that it returns has to leave.
func (s *service) enter(ctx context.Context) (*caller, error) {
	if v := metadata.ValueFromIncomingContext(ctx, securityHeader); len(v) != 1 || v[0] != "true" {
		return nil, errHeader
	}
	if s.stopping.Err() != nil {
		return nil, errStopping
	}
	p, ok := peerFrom(ctx)
	if !ok {
		return nil, errAttest
	}
	if !s.calls.acquire(p.UID()) {
		s.warnBusy(p, "calls", s.calls.limit)
		return nil, errBusy
	}
	c, err := s.attest(ctx, p)
	if err != nil {
		s.calls.release(p.UID())
		return nil, err
	}
	return c, nil
}

// warnBusy says, once in a while, that a user has too many of something open.
func (s *Server) warnBusy(p *attest.Peer, what string, limit int) {
	if s.said.first(about{kind: what, uid: p.UID()}) {
		s.log.Warn("a user's processes have too many "+what+" open, new ones are refused",
			slog.Uint64("uid", uint64(p.UID())), slog.Int("pid", p.PID()),
			slog.String("path", p.Executable()), slog.Int("limit", limit))
	}
}

func (c *caller) leave() { c.s.calls.release(c.peer.UID()) }

func (s *service) attest(ctx context.Context, p *attest.Peer) (*caller, error) {
	needs := s.cfg.Needs()
	res, err := attest.Selectors(ctx, p, s.cfg.Attestors)
	failure := cmp.Or(err, res.Partial)
	switch {
	case errors.Is(err, attest.ErrGone):
		return nil, errGone
	case ctx.Err() != nil:
		return nil, status.FromContextError(ctx.Err()).Err()
	case failure != nil && s.said.first(about{kind: "attest", uid: p.UID()}):
		s.log.Warn("a caller could not be attested in full", slog.Any("error", failure),
			slog.Int("pid", p.PID()), slog.Uint64("uid", uint64(p.UID())), slog.String("path", p.Executable()))
	}
	if err != nil {
		return nil, errAttest
	}
	return &caller{s: s.Server, peer: p, selectors: res.Selectors, uncertain: failure != nil, needs: needs}, nil
}

// outdated reports whether attestors find out more by now than when the caller
// was attested.
func (c *caller) outdated() bool { return c.s.cfg.Needs() > c.needs }

// incomplete reports whether the caller may have selectors that are not known.
func (c *caller) incomplete() bool { return c.uncertain || c.outdated() }

// reattest attests the caller of an open stream again if it is outdated, and
// reports whether its selectors are others now. Where it cannot be attested in
// full, or not within reattestWait, it keeps all selectors that it had: an entry
// that is new to the node takes no identity away.
func (s *service) reattest(ctx context.Context, c *caller) (changed bool, err error) {
	needs := s.cfg.Needs()
	if needs <= c.needs || time.Now().Before(c.reattest) {
		return false, nil
	}
	limited, cancel := context.WithTimeout(ctx, reattestWait)
	defer cancel()
	now, err := s.attest(limited, c.peer)
	if limited.Err() != nil && ctx.Err() == nil && !errors.Is(err, errGone) {
		c.reattest = time.Now().Add(reattestPause)
		if s.said.first(about{kind: "reattest", uid: c.peer.UID()}) {
			s.log.Warn("attestation of a stream's caller delayed, the stream goes on without new selectors", slog.Int("pid", c.peer.PID()),
				slog.Uint64("uid", uint64(c.peer.UID())), slog.String("path", c.peer.Executable()), slog.Duration("delay", reattestWait))
		}
		return false, nil
	}
	c.needs = needs
	switch {
	case err == nil && (!now.uncertain || subset(c.selectors, now.selectors)):
		changed = !subset(now.selectors, c.selectors) || !subset(c.selectors, now.selectors)
		c.selectors, c.uncertain = now.selectors, now.uncertain
	case err == nil, errors.Is(err, errAttest):
		c.uncertain, err = true, nil
	}
	return changed, err
}

// subset reports whether every selector in some is in all.
func subset(some, all []cache.Selector) bool {
	return !slices.ContainsFunc(some, func(s cache.Selector) bool { return !slices.Contains(all, s) })
}

// admit says whether the view may be told to the caller at all.
func (c *caller) admit(v *cache.View) error {
	switch {
	case !v.Ready:
		return errStarting
	case v.Matched > 0:
		return nil
	case c.incomplete():
		// The selectors that would match may be those that are missing.
		return errAttest
	}
	if c.s.said.first(about{kind: c.describe()}) {
		c.s.log.Info("a caller was denied, no registration entry matches its selectors",
			slog.Int("pid", c.peer.PID()), slog.Uint64("uid", uint64(c.peer.UID())),
			slog.String("path", c.peer.Executable()), slog.String("selectors", c.describe()))
	}
	return errDenied
}

// describe lists the selectors for a message.
func (c *caller) describe() string {
	names := make([]string, len(c.selectors))
	for i, s := range c.selectors {
		names[i] = s.String()
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}
