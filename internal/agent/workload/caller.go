package workload

import (
	"context"
	"errors"
	"fmt"
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

// caller is the attested process of one call.
type caller struct {
	s         *Server
	peer      *attest.Peer
	selectors []cache.Selector
	// missing are the types of which selectors may be missing, because their
	// attestors failed.
	missing     []string
	attestedFor uint64 // Config.Needs before the attestation
	// nextReattest is the earliest time of the next attempt after one took too long or
	// failed.
	nextReattest time.Time
}

const (
	// reattestWait is how long an open stream waits for the re-attestation of its
	// caller: a large program takes seconds to hash, and a file system may hang.
	// Renewals must not wait for that.
	reattestWait = 5 * time.Second
	// reattestPause is how long the stream then keeps the known selectors, and how
	// soon it has those of an attestor that recovers. A hash that was started goes on
	// meanwhile.
	reattestPause = 30 * time.Second
)

// securityHeader protects the API against server-side request forgery: SPIFFE
// Workload Endpoint, section 6.
const securityHeader = "workload.spiffe.io"

var (
	errNoHeader = status.Error(codes.InvalidArgument, "security header missing: send the metadata \"workload.spiffe.io: true\" exactly once")
	errStarting = status.Error(codes.Unavailable, "agent is starting: no answer from the server yet")
	errStopping = status.Error(codes.Unavailable, "agent is stopping")
	errLimit    = status.Error(codes.Unavailable, "too many open calls of this user")
	errGone     = status.Error(codes.Unavailable, "the process that opened this connection has exited: open a new connection")
	errAttest   = status.Error(codes.Unavailable, "attestation of the caller failed: see the agent's log")
	errDenied   = status.Error(codes.PermissionDenied, "no registration entry matches this process")
)

// admitCall checks the security header, counts the call and attests the caller. The
// caller that it returns must be released.
func (s *service) admitCall(ctx context.Context) (*caller, error) {
	if v := metadata.ValueFromIncomingContext(ctx, securityHeader); len(v) != 1 || v[0] != "true" {
		return nil, errNoHeader
	}
	if s.stopping.Err() != nil {
		return nil, errStopping
	}
	info, ok := peerOf(ctx)
	if !ok {
		return nil, errAttest
	}
	p := info.peer
	if !s.calls.acquire(p.UID()) {
		s.logLimitExceeded(p, "calls", s.calls.limit)
		return nil, errLimit
	}
	c, err := s.attest(ctx, p)
	if err != nil {
		s.calls.release(p.UID())
		return nil, err
	}
	return c, nil
}

// logLimitExceeded logs that a user is at the limit of a resource.
func (s *Server) logLimitExceeded(p *attest.Peer, resource string, limit int) {
	s.note(slog.LevelWarn, "limit of a user exceeded", fmt.Sprint(resource, p.UID()), p, "resource", resource, "limit", limit)
}

// note logs a line about a process, which may repeat.
func (s *Server) note(level slog.Level, message, about string, p *attest.Peer, attrs ...any) {
	s.lines.Note(level, message, about, append(attrs, "pid", p.PID(), "user", p.UID(), "path", executable{p})...)
}

// executable is the path of a process's executable, which is read only for a line that is
// written. It is empty if the process has ended.
type executable struct{ *attest.Peer }

// LogValue implements [slog.LogValuer].
func (e executable) LogValue() slog.Value {
	if e.Alive() != nil {
		return slog.StringValue("")
	}
	return slog.StringValue(e.Executable())
}

func (c *caller) release() { c.s.calls.release(c.peer.UID()) }

func (s *service) attest(ctx context.Context, p *attest.Peer) (*caller, error) {
	needs := s.cfg.Needs()
	found, err := attest.Selectors(ctx, p, s.cfg.Attestors)
	switch {
	case errors.Is(err, attest.ErrGone):
		return nil, errGone
	case ctx.Err() != nil:
		return nil, status.FromContextError(ctx.Err()).Err()
	case err != nil:
		s.note(slog.LevelWarn, "caller attestation failed", fmt.Sprint(p.UID()), p, "error", err)
		return nil, errAttest
	}
	for _, f := range found {
		s.cfg.Observer.Attested(f.Attestor, f.Took, f.Err)
		if f.Err != nil {
			s.note(slog.LevelWarn, "caller attestation incomplete", fmt.Sprint(f.Attestor, " ", p.UID()), p, "attestor", f.Attestor, "error", f.Err)
		}
	}
	c := &caller{s: s.Server, peer: p, selectors: found.Selectors(), missing: found.Missing(), attestedFor: needs}
	if len(c.missing) > 0 {
		c.nextReattest = time.Now().Add(reattestPause)
	}
	return c, nil
}

// outdated reports whether the attestors find more selectors now than when the
// caller was attested.
func (c *caller) outdated() bool { return c.s.cfg.Needs() > c.attestedFor }

// incomplete reports whether another attestation may find more selectors.
func (c *caller) incomplete() bool { return c.outdated() || len(c.missing) > 0 }

// mayMatch reports whether entries could match the caller if no selectors were missing.
func (c *caller) mayMatch(wanted func(*cache.Entry) bool) bool {
	return c.outdated() || c.s.cfg.Cache.MayMatch(c.selectors, c.missing, wanted)
}

// reattest attests the caller of an open stream again if its attestation is incomplete,
// and reports whether its selectors changed. If that stays so or takes longer than
// reattestWait, the caller keeps its selectors: a new entry on the node, or an attestor
// that fails, takes no identity away.
func (s *service) reattest(ctx context.Context, c *caller) (changed bool, err error) {
	needs := s.cfg.Needs()
	if !c.incomplete() || time.Now().Before(c.nextReattest) {
		return false, nil
	}
	limited, cancel := context.WithTimeout(ctx, reattestWait)
	defer cancel()
	now, err := s.attest(limited, c.peer)
	if limited.Err() != nil && ctx.Err() == nil && !errors.Is(err, errGone) {
		c.nextReattest = time.Now().Add(reattestPause)
		s.note(slog.LevelWarn, "caller re-attestation delayed, its stream keeps the known selectors", fmt.Sprint(c.peer.UID()), c.peer, "delay", reattestWait)
		return false, nil
	}
	switch {
	case errors.Is(err, errAttest):
		c.nextReattest = time.Now().Add(reattestPause)
		return false, nil
	case err != nil:
		return false, err
	}
	if len(now.missing) == 0 || isSubset(c.selectors, now.selectors) {
		changed = !isSubset(now.selectors, c.selectors) || !isSubset(c.selectors, now.selectors)
		c.selectors = now.selectors
	}
	c.missing, c.attestedFor, c.nextReattest = now.missing, needs, now.nextReattest
	return changed, nil
}

// isSubset reports whether every selector in some is in all.
func isSubset(some, all []cache.Selector) bool {
	return !slices.ContainsFunc(some, func(s cache.Selector) bool { return !slices.Contains(all, s) })
}

// authorize returns nil if the caller may see the view.
func (c *caller) authorize(v *cache.View) error {
	switch {
	case !v.Ready:
		return errStarting
	case v.Matched > 0:
		return nil
	case c.mayMatch(func(*cache.Entry) bool { return true }):
		return errAttest
	}
	c.s.note(slog.LevelInfo, "caller denied, no registration entry matches", c.describe(), c.peer, c.loggable()...)
	return errDenied
}

// describe lists the selectors. They may be secrets, such as the environment of a container:
// log [caller.loggable].
func (c *caller) describe() string {
	names := make([]string, len(c.selectors))
	for i, s := range c.selectors {
		names[i] = s.String()
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// loggable returns the attributes of a log line that tell the selectors: the types of all,
// and the values of those in Config.LogSelectors.
func (c *caller) loggable() []any {
	var types, values []string
	for _, s := range c.selectors {
		types = append(types, s.Type)
		if slices.ContainsFunc(c.s.cfg.LogSelectors, func(prefix string) bool { return hasPrefix(s, prefix) }) {
			values = append(values, s.String())
		}
	}
	slices.Sort(types)
	slices.Sort(values)
	return []any{"selector_types", strings.Join(slices.Compact(types), " "), "selectors", strings.Join(values, " ")}
}

// hasPrefix reports whether a selector is of a type, such as docker, or begins with whole
// parts, such as docker:label.
func hasPrefix(s cache.Selector, prefix string) bool {
	rest, found := strings.CutPrefix(s.String(), prefix)
	return found && (rest == "" || rest[0] == ':')
}
