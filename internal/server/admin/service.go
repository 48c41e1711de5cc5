// Package admin implements the Operator service of package api, the part of SPIRE's Entry
// service that is for administrators, and their authorization.
//
// Operators call it at the admin socket, where the kernel identifies the user, or over
// mTLS with an X.509-SVID of the trust domain. [Rules] give roles to users and SPIFFE IDs.
// A table has the role that each method needs; other methods are rejected. The audit log
// names the caller of each mutation.
package admin

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/loglimit"
	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/internal/server/detach"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// Deployment is a deployment of the server.
type Deployment struct {
	Name string
	// Retired says that agents can no longer reach it, so none is waited for.
	Retired bool
	Keysets *keyset.Deployment
	Server  *spireapi.Server
	Ledger  *ledger.Ledger
	// Audit returns at most limit records with a number above after.
	Audit func(ctx context.Context, after uint64, limit int) ([]AuditRecord, error)
	// Automatic returns the next step of automatic rotation. It is nil if there is none.
	Automatic func() rotation.Preview
}

// AuditRecord is a mutation. Numbers start at 1 and have no gaps.
type AuditRecord struct {
	Number uint64
	keyset.Change
}

// Config configures a [Service]. TrustDomain, Deployments and Published are required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Deployments []Deployment
	// Published returns the trust bundle of all deployments.
	Published func() *keyset.Bundle
	// Follows reports whether the server fetches the bundle of a federated trust
	// domain. If it is nil, entries are applied without a warning about that.
	Follows func(spiffeid.TrustDomain) bool
	// Backup writes a copy of the store to w and returns its size in bytes.
	Backup func(ctx context.Context, w io.Writer) (size int64, err error)
	// Certificate returns the certificate for remote operators. ServeTLS needs it.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	Rules       Rules // until SetRules
	// Connections limits the connections of all listeners together. If it is nil, each
	// listener has its own limit.
	Connections *listen.Pool
	// Options are added to every gRPC server.
	Options []grpc.ServerOption
	Log     *slog.Logger // discards when nil
	// Clock is the server's clock; if it is nil, the machine's. ConfirmClock confirms it
	// durably and reports whether it shows about that time; if it is nil, in memory
	// only. Heard receives the time that a remote operator's clock showed at a call; may
	// be nil.
	Clock        *clock.Clock
	ConfirmClock func(ctx context.Context, at time.Time) (bool, error)
	Heard        func(actor string, sentAt time.Time)
}

// Service implements the Operator service. It is safe for concurrent use.
type Service struct {
	api.UnimplementedOperatorServer
	config Config
	rules  atomic.Pointer[Rules]
	log    *slog.Logger
	lines  *loglimit.Log
	now    func() time.Time
	calls  detach.Group
}

// Wait returns when no call waits for storage. Call it after storage is closed.
func (s *Service) Wait() { s.calls.Wait() }

// New returns a Service, or an error if a required field of the Config is missing.
func New(c Config) (*Service, error) {
	if c.TrustDomain.IsZero() || len(c.Deployments) == 0 || c.Published == nil {
		return nil, errors.New("new operator service: needs a trust domain, deployments and the published bundle")
	}
	c.Clock = cmp.Or(c.Clock, clock.New(nil, nil, time.Time{}))
	if c.ConfirmClock == nil {
		c.ConfirmClock = func(_ context.Context, at time.Time) (bool, error) { return c.Clock.Confirm(at), nil }
	}
	if c.Heard == nil {
		c.Heard = func(string, time.Time) {}
	}
	s := &Service{config: c, log: cmp.Or(c.Log, slog.New(slog.DiscardHandler)), now: c.Clock.Now}
	s.lines = listen.NewLog(s.log)
	s.SetRules(c.Rules)
	return s, nil
}

// SetRules replaces the rules, for each further call. A connection of an operator who had
// no role continues to count as anonymous.
func (s *Service) SetRules(r Rules) { s.rules.Store(&r) }

// scoped is a request that names a deployment.
type scoped interface{ GetScope() *api.Scope }

// find returns the deployment of a request.
func (s *Service) find(req scoped) (*Deployment, error) {
	scope := req.GetScope()
	if err := s.checkTrustDomain(scope.GetTrustDomain()); err != nil {
		return nil, err
	}
	name := scope.GetDeployment()
	if name == "" && len(s.config.Deployments) == 1 {
		return &s.config.Deployments[0], nil
	}
	for i := range s.config.Deployments {
		if s.config.Deployments[i].Name == name {
			return &s.config.Deployments[i], nil
		}
	}
	var names []string
	for _, d := range s.config.Deployments {
		names = append(names, d.Name)
	}
	if name == "" {
		return nil, status.Errorf(codes.InvalidArgument, "there are several deployments, %q: name one of them", names)
	}
	return nil, status.Errorf(codes.NotFound, "there is no deployment %q, only %q", name, names)
}

func (s *Service) checkTrustDomain(name string) error {
	if name != "" && name != s.config.TrustDomain.Name() {
		return status.Errorf(codes.NotFound, "this is the server of trust domain %q, not of %q", s.config.TrustDomain.Name(), name)
	}
	return nil
}

// ListDeployments implements the service. It omits retired deployments, which other
// methods still find by name.
func (s *Service) ListDeployments(_ context.Context, req *api.ListDeploymentsRequest) (*api.ListDeploymentsResponse, error) {
	if err := s.checkTrustDomain(req.GetTrustDomain()); err != nil {
		return nil, err
	}
	resp := &api.ListDeploymentsResponse{TrustDomain: s.config.TrustDomain.Name()}
	for _, d := range s.config.Deployments {
		if !d.Retired {
			resp.Deployments = append(resp.Deployments, d.Name)
		}
	}
	return resp, nil
}

// PrepareKeyset implements the service.
func (s *Service) PrepareKeyset(ctx context.Context, req *api.PrepareKeysetRequest) (*api.PrepareKeysetResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	k, err := d.Keysets.Prepare(ctx)
	if err != nil {
		return nil, statusError(err)
	}
	return &api.PrepareKeysetResponse{Keyset: protoKeyset(d.keysetFigures(k))}, nil
}

// ActivateKeyset implements the service.
func (s *Service) ActivateKeyset(ctx context.Context, req *api.ActivateKeysetRequest) (*api.ActivateKeysetResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	if err := d.Keysets.Activate(ctx, req.GetKeysetId()); err != nil {
		return nil, statusError(err)
	}
	return &api.ActivateKeysetResponse{}, nil
}

// TaintKeyset implements the service.
func (s *Service) TaintKeyset(ctx context.Context, req *api.TaintKeysetRequest) (*api.TaintKeysetResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	if err := d.Keysets.Taint(ctx, req.GetKeysetId()); err != nil {
		return nil, statusError(err)
	}
	return &api.TaintKeysetResponse{}, nil
}

// RemoveKeyset implements the service. Only X.509-SVIDs make removal unsafe. Agents do not
// replace JWT-SVIDs before the key is removed, so waiting for their expiry is the
// operator's choice; ListKeysets has the time.
func (s *Service) RemoveKeyset(ctx context.Context, req *api.RemoveKeysetRequest) (*api.RemoveKeysetResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	if req.GetForce() {
		ctx = keyset.WithNote(ctx, d.forcedNote(req.GetKeysetId()))
	}
	var removed keyset.Keyset
	err = d.Keysets.Remove(ctx, req.GetKeysetId(), func(all []keyset.Keyset) error {
		removed = all[slices.IndexFunc(all, func(k keyset.Keyset) bool { return k.ID == req.GetKeysetId() })]
		if h := d.Ledger.X509(removed.X509AuthorityID, true); !h.Clear && !req.GetForce() {
			return notSafe(removed.ID, h, s.clockNote())
		}
		return nil
	})
	if err != nil {
		return nil, statusError(err)
	}
	// Clean up even if the caller is gone.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	if err := d.Ledger.Removed(ctx, removed.X509AuthorityID, removed.JWTKeyID); err != nil {
		// The rows expire and are not read until then.
		s.log.Warn("ledger rows of a removed keyset not deleted, they stay until they expire", "deployment", d.Name, "keyset_id", removed.ID, "error", err)
	}
	return &api.RemoveKeysetResponse{}, nil
}

// cleanupTimeout limits the deletion of a removed keyset's ledger rows, which delays the
// answer.
const cleanupTimeout = 5 * time.Second

// forcedNote returns the audit log's note of a forced removal.
func (d *Deployment) forcedNote(id string) string {
	for _, k := range d.Keysets.Status().Keysets {
		if h := d.Ledger.X509(k.X509AuthorityID, k.State == keyset.Tainted); k.ID == id && !h.Clear {
			return "forced: " + describeHolding(h)
		}
	}
	return "forced, although nothing depended on it"
}

// describeHolding says which SVIDs of an authority may be in use.
func describeHolding(h ledger.Holding) string {
	if !h.UnknownUntil.IsZero() {
		text := fmt.Sprintf("the server was restored from a copy of %s; SVIDs signed since then are not known and may be in use until %s",
			clock.Text(h.UnknownSince), clock.Text(h.UnknownUntil))
		if h.SVIDs > 0 {
			text += "; so may " + quantity(h.SVIDs, "known X.509-SVID")
		}
		return text
	}
	text := quantity(h.SVIDs, "X.509-SVID")
	if h.Agents > 0 {
		text += " of " + quantity(h.Agents, "agent")
	}
	text += " may still be in use"
	if !h.Latest.IsZero() {
		text += ", the last of them until " + clock.Text(h.Latest)
	}
	return text
}

func quantity(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.Itoa(n) + " " + noun + "s"
}

func notSafe(id string, h ledger.Holding, clockNote string) error {
	st := status.Newf(codes.FailedPrecondition, "keyset %s is not safe to remove: %s%s", id, describeHolding(h), clockNote)
	if detailed, err := st.WithDetails(&errdetails.ErrorInfo{Reason: api.ReasonNotSafe, Domain: api.ErrorDomain, Metadata: map[string]string{
		"svids": strconv.Itoa(h.SVIDs), "agents": strconv.Itoa(h.Agents),
	}}); err == nil {
		st = detailed
	}
	return st.Err()
}

// statusError returns the gRPC status for an error.
func statusError(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	if refused, ok := errors.AsType[refusal.Error](err); ok {
		code := codes.FailedPrecondition
		switch refused {
		case refusal.ErrNotFound:
			code = codes.NotFound
		case refusal.ErrBusy:
			code = codes.Aborted
		}
		return status.Error(code, refused.Error())
	}
	if entry, ok := errors.AsType[*spireapi.EntryError](err); ok {
		return status.Error(codes.InvalidArgument, entry.Error())
	}
	if entries, ok := errors.AsType[spireapi.EntryErrors](err); ok {
		return status.Error(codes.InvalidArgument, entries.Error())
	}
	if removal, ok := errors.AsType[removalError](err); ok {
		return status.Error(codes.FailedPrecondition, removal.Error())
	}
	switch {
	case errors.Is(err, spireapi.ErrNotFound):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return status.Errorf(codes.DeadlineExceeded, "timeout, and the outcome is not known: %v", err)
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	}
	// Callers have a role, so the message may describe the server's state.
	return status.Error(codes.Internal, err.Error())
}
