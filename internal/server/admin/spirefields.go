package admin

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// setFields sets those fields of an entry that a mask selects, all when it is nil, from SPIRE's
// form of an entry. An error is about a field that is malformed, in the words of SPIRE 1.13.3
// (pkg/server/api), or about one that the server does not have. Package spireapi validates
// the rest.
func (s *Service) setFields(to *spireapi.Entry, in *types.Entry, mask *types.EntryMask) (err error) {
	all := mask == nil
	if in == nil {
		return errors.New("missing entry")
	}
	switch {
	case in.GetAdmin() && (all || mask.GetAdmin()):
		return errors.New("admin: an entry gives no access to this server's API: name its SPIFFE ID in operators of the server's configuration")
	case in.GetDownstream() && (all || mask.GetDownstream()):
		return errors.New("downstream: this server signs no certificates of downstream servers: leave it out")
	case in.GetStoreSvid() && (all || mask.GetStoreSvid()):
		return errors.New("store_svid: agents of this server store no SVIDs for others: leave it out")
	}
	if all || mask.GetParentId() {
		if to.ParentID, err = s.member(in.GetParentId()); err != nil {
			return fmt.Errorf("invalid parent ID: %w", err)
		}
		if to.ParentID == s.everyone() {
			to.ParentID = spiffeid.ID{}
		}
	}
	if all || mask.GetSpiffeId() {
		if to.SPIFFEID, err = s.workload(in.GetSpiffeId()); err != nil {
			return fmt.Errorf("invalid spiffe ID: %w", err)
		}
	}
	if all || mask.GetDnsNames() {
		to.DNSNames = in.GetDnsNames()
	}
	if all || mask.GetExpiresAt() {
		to.ExpiresAt = time.Time{}
		if at := in.GetExpiresAt(); at != 0 {
			to.ExpiresAt = time.Unix(at, 0)
		}
	}
	if all || mask.GetFederatesWith() {
		if to.FederatesWith, err = trustDomains(in.GetFederatesWith()); err != nil {
			return fmt.Errorf("invalid federated trust domain: %w", err)
		}
	}
	if all || mask.GetSelectors() {
		if len(in.GetSelectors()) == 0 {
			return errors.New("selector list is empty")
		}
		if to.Selectors, err = selectors(in.GetSelectors()); err != nil {
			return err
		}
	}
	if all || mask.GetX509SvidTtl() {
		to.X509TTL = seconds(in.GetX509SvidTtl())
	}
	if all || mask.GetJwtSvidTtl() {
		to.JWTTTL = seconds(in.GetJwtSvidTtl())
	}
	if all || mask.GetHint() {
		to.Hint = in.GetHint()
	}
	if all || mask.GetAdditionalAttributes() {
		to.DisableX509SVIDPrefetch = in.GetAdditionalAttributes().GetDisableX509SvidPrefetch()
		to.JWTSVIDIncludeJTI = in.GetAdditionalAttributes().GetJwtSvidIncludeJti()
	}
	return nil
}

func seconds(n int32) time.Duration { return time.Duration(n) * time.Second }

// member returns an ID of the trust domain with a path.
func (s *Service) member(p *types.SPIFFEID) (spiffeid.ID, error) { return s.id(p, "a member of") }

// workload returns an ID of the trust domain that workloads can have.
func (s *Service) workload(p *types.SPIFFEID) (spiffeid.ID, error) {
	id, err := s.id(p, "a workload in")
	if err == nil && (id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/")) {
		err = fmt.Errorf("%q is not a workload in trust domain %q; path is in the reserved namespace", id, s.config.TrustDomain)
	}
	return id, err
}

func (s *Service) id(p *types.SPIFFEID, kind string) (spiffeid.ID, error) {
	if p == nil {
		return spiffeid.ID{}, errors.New("request must specify SPIFFE ID")
	}
	td, err := spiffeid.TrustDomainFromString(p.GetTrustDomain())
	if err != nil {
		return spiffeid.ID{}, err
	}
	id, err := spiffeid.FromPath(td, p.GetPath())
	switch {
	case err != nil:
		return spiffeid.ID{}, err
	case !id.MemberOf(s.config.TrustDomain):
		return spiffeid.ID{}, fmt.Errorf("%q is not a member of trust domain %q", id, s.config.TrustDomain)
	case id.Path() == "":
		return spiffeid.ID{}, fmt.Errorf("%q is not %s trust domain %q; path is empty", id, kind, s.config.TrustDomain)
	}
	return id, nil
}

func trustDomains(names []string) (out []spiffeid.TrustDomain, err error) {
	for _, name := range names {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, err
		}
		if err := config.CheckTrustDomain(td.Name()); err != nil {
			return nil, fmt.Errorf("%q %w", td.Name(), err)
		}
		out = append(out, td)
	}
	return out, nil
}

func selectors(in []*types.Selector) (out []spireapi.Selector, err error) {
	for _, sel := range in {
		switch {
		case sel.GetType() == "":
			return nil, errors.New("missing selector type")
		case strings.Contains(sel.GetType(), ":"):
			return nil, errors.New("selector type contains ':'")
		case sel.GetValue() == "":
			return nil, errors.New("missing selector value")
		}
		out = append(out, spireapi.Selector{Type: sel.GetType(), Value: sel.GetValue()})
	}
	return out, nil
}

// entryFilter is the filter of a request to list or to count entries. All of its conditions
// must hold.
type entryFilter interface {
	GetByHint() *wrapperspb.StringValue
	GetByParentId() *types.SPIFFEID
	GetBySpiffeId() *types.SPIFFEID
	GetBySelectors() *types.SelectorMatch
	GetByFederatesWith() *types.FederatesWithMatch
	GetByDownstream() *wrapperspb.BoolValue
}

// condition is one of the conditions of a filter.
type condition func(*spireapi.StoredEntry) bool

// filter returns a list that has all the entries of a filter, ordered by ID, and what tells
// them from others in the list.
func (s *Service) filter(set *spireapi.EntrySet, f entryFilter) ([]*spireapi.StoredEntry, condition, error) {
	malformed := func(what string, err error) ([]*spireapi.StoredEntry, condition, error) {
		return nil, nil, status.Errorf(codes.InvalidArgument, "malformed %s filter: %v", what, err)
	}
	list := set.All()
	var conditions []condition
	if p := f.GetByParentId(); p != nil {
		parent, err := s.member(p)
		if err != nil {
			return malformed("parent ID", err)
		}
		if parent == s.everyone() {
			parent = spiffeid.ID{}
		}
		list = set.OfParent(parent)
		conditions = append(conditions, func(e *spireapi.StoredEntry) bool { return e.ParentID == parent })
	}
	if p := f.GetBySpiffeId(); p != nil {
		id, err := s.workload(p)
		if err != nil {
			return malformed("SPIFFE ID", err)
		}
		if of := set.OfSPIFFEID(id); len(of) < len(list) {
			list = of
		}
		conditions = append(conditions, func(e *spireapi.StoredEntry) bool { return e.SPIFFEID == id })
	}
	if hint := f.GetByHint().GetValue(); hint != "" {
		conditions = append(conditions, func(e *spireapi.StoredEntry) bool { return e.Hint == hint })
	}
	if m := f.GetBySelectors(); m != nil {
		want, err := selectors(m.GetSelectors())
		if err == nil && len(want) == 0 {
			err = errors.New("empty selector set")
		}
		matches, err2 := matcher(int32(m.GetMatch()), want)
		if err := cmp.Or(err, err2); err != nil {
			return malformed("selectors", err)
		}
		conditions = append(conditions, func(e *spireapi.StoredEntry) bool { return matches(e.Selectors) })
	}
	if m := f.GetByFederatesWith(); m != nil {
		want, err := trustDomains(m.GetTrustDomains())
		if err == nil && len(want) == 0 {
			err = errors.New("empty trust domain set")
		}
		matches, err2 := matcher(int32(m.GetMatch()), want)
		if err := cmp.Or(err, err2); err != nil {
			return malformed("federates with", err)
		}
		conditions = append(conditions, func(e *spireapi.StoredEntry) bool { return matches(e.FederatesWith) })
	}
	if f.GetByDownstream().GetValue() {
		list = nil // there are none
	}
	return list, func(e *spireapi.StoredEntry) bool {
		return !slices.ContainsFunc(conditions, func(holds condition) bool { return !holds(e) })
	}, nil
}

// matcher returns what compares a set of an entry, which has no element twice, with that of a
// filter. The numbers of the behaviors are the same for selectors and for trust domains. Sets
// without a common element match in no way.
func matcher[T comparable](behavior int32, filter []T) (func(entry []T) bool, error) {
	set := make(map[T]bool, len(filter))
	for _, v := range filter {
		set[v] = true
	}
	common := func(entry []T) (n int) {
		for _, v := range entry {
			if set[v] {
				n++
			}
		}
		return n
	}
	switch types.SelectorMatch_MatchBehavior(behavior) {
	case types.SelectorMatch_MATCH_EXACT:
		return func(entry []T) bool { n := common(entry); return n == len(entry) && n == len(set) }, nil
	case types.SelectorMatch_MATCH_SUBSET:
		return func(entry []T) bool { n := common(entry); return n == len(entry) && n > 0 }, nil
	case types.SelectorMatch_MATCH_SUPERSET:
		return func(entry []T) bool { return common(entry) == len(set) }, nil
	case types.SelectorMatch_MATCH_ANY:
		return func(entry []T) bool { return common(entry) > 0 }, nil
	}
	return nil, fmt.Errorf("match behavior %d is not known", behavior)
}
