package workload

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/cache"
)

const (
	maxAudiences   = 64
	maxAudienceLen = 2048 // bytes
	// staleWait is how long a caller whose cached token is past half of its
	// life waits for a new one before it gets the cached one.
	staleWait = 2 * time.Second
)

var errNotMinted = status.Error(codes.Unavailable, "the server did not mint a JWT-SVID: the agent's log says why")

// FetchJWTSVID returns JWT-SVIDs for the audience: one for each matched entry,
// or the one with the SPIFFE ID asked for (SPIFFE Workload API, section 6.2.1).
func (s *service) FetchJWTSVID(ctx context.Context, req *workloadpb.JWTSVIDRequest) (*workloadpb.JWTSVIDResponse, error) {
	c, err := s.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer c.leave()
	audience, err := canonical(req.Audience)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	var wanted spiffeid.ID
	if req.SpiffeId != "" {
		if wanted, err = spiffeid.FromString(req.SpiffeId); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "spiffe_id: %v", err)
		}
	}
	v := s.cfg.Cache.Match(c.selectors)
	if err := c.admit(&v); err != nil {
		return nil, err
	}
	hints := cache.Hints(v.Entries)
	entries := v.Entries
	if !wanted.IsZero() {
		at := slices.IndexFunc(entries, func(e *cache.Entry) bool { return e.SPIFFEID == wanted })
		switch {
		case at >= 0:
		case c.uncertain:
			return nil, errAttest
		case v.Partial:
			return nil, errStarting
		default:
			return nil, status.Error(codes.PermissionDenied, "no registration entry gives this process that SPIFFE ID")
		}
		entries, hints = entries[at:at+1], hints[at:at+1]
	}
	// All are asked for before the first is waited for.
	flights := make([]*flight, len(entries))
	held := make([]cache.JWT, len(entries))
	for i, e := range entries {
		var ok bool
		if held[i], ok = s.cfg.Cache.JWT(e, audience); !ok || !held[i].Fresh(s.cfg.Cache.Now()) {
			if flights[i], err = s.mint(c, e, audience); err != nil {
				return nil, err
			}
		}
	}
	patience, cancel := context.WithTimeout(ctx, staleWait)
	defer cancel()
	res := &workloadpb.JWTSVIDResponse{Svids: make([]*workloadpb.JWTSVID, len(entries))}
	for i, e := range entries {
		jwt := held[i]
		if flights[i] != nil {
			if jwt, err = s.await(ctx, patience, flights[i], held[i]); err != nil {
				return nil, err
			}
		}
		res.Svids[i] = &workloadpb.JWTSVID{SpiffeId: e.SPIFFEID.String(), Svid: jwt.Token, Hint: hints[i]}
	}
	return res, nil
}

// await returns what f mints. Where a token is held already, it is the answer
// when f fails or patience ends.
func (s *service) await(ctx, patience context.Context, f *flight, held cache.JWT) (cache.JWT, error) {
	if held.Token == "" {
		patience = ctx
	}
	select {
	case <-f.done:
	case <-patience.Done():
	case <-s.stopping.Done():
		return cache.JWT{}, errStopping
	}
	select {
	case <-f.done:
		if f.err == nil {
			return f.jwt, nil
		}
	default:
	}
	switch {
	case ctx.Err() != nil:
		return cache.JWT{}, status.FromContextError(ctx.Err()).Err()
	case held.Token == "":
		return cache.JWT{}, errNotMinted
	}
	return held, nil
}

// canonical sorts the audience and drops repeats. It refuses what no verifier
// would ever ask for.
func canonical(audience []string) ([]string, error) {
	if len(audience) == 0 {
		return nil, errors.New("audience must be given")
	}
	if len(audience) > maxAudiences {
		return nil, fmt.Errorf("no more than %d audiences are possible", maxAudiences)
	}
	out := slices.Clone(audience)
	slices.Sort(out)
	out = slices.Compact(out)
	for _, a := range out {
		switch {
		case a == "":
			return nil, errors.New("audience must not be empty")
		case len(a) > maxAudienceLen:
			return nil, fmt.Errorf("an audience has no more than %d bytes", maxAudienceLen)
		case strings.ContainsRune(a, 0):
			return nil, errors.New("audience must not hold NUL")
		}
	}
	return out, nil
}
