package renewd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/operator/runbook"
)

// Backend returns a deployment of the server as a [runbook.Backend]. Empty names mean the
// server's trust domain and its only deployment.
func (c *Client) Backend(trustDomain, deployment string) runbook.Backend {
	return &backend{c: c.OperatorClient, scope: &api.Scope{TrustDomain: trustDomain, Deployment: deployment}}
}

type backend struct {
	c     api.OperatorClient
	scope *api.Scope
}

// Status implements runbook.Backend.
func (b *backend) Status(ctx context.Context) (runbook.Status, error) {
	resp, err := b.c.ListKeysets(ctx, &api.ListKeysetsRequest{Scope: b.scope})
	if err != nil {
		return runbook.Status{}, readError(err)
	}
	s := runbook.Status{
		TrustDomain: resp.GetScope().GetTrustDomain(), Deployment: resp.GetScope().GetDeployment(),
		Sequence: resp.GetSequence(), Agents: int(resp.GetAgents()), AgentsBehind: int(resp.GetAgentsBehind()), Duplicated: resp.GetAgentsDuplicated(),
		Automatic: automatic(resp.GetAutomatic()), ClockDoubt: ClockDoubt(resp.GetClock()),
		Evict: "server agent evict ID", EvictGone: "server agent evict ID --gone",
		Behind: holders(resp.GetBehind()), ServerStartedAt: fromProtoTime(resp.GetServerStartedAt()),
	}
	for _, k := range resp.GetKeysets() {
		s.Keysets = append(s.Keysets, fromProto(k))
	}
	return s, nil
}

// automatic describes the next step of automatic rotation. It is empty if that is off.
func automatic(a *api.Automatic) string {
	switch {
	case a == nil || a.GetMode() == "off" || a.GetMode() == "":
		return ""
	case a.GetNext() == "":
		return a.GetMode() + ", nothing to do"
	}
	text, at := a.GetMode()+", next: "+a.GetNext(), " at "
	if a.GetWaitsFor() != "" {
		text, at = text+", waits for "+a.GetWaitsFor(), ", at the latest on "
	}
	if a.GetAt() != nil {
		text += at + clock.Text(a.GetAt().AsTime())
	}
	return text
}

var stateNames = map[api.KeysetState]runbook.State{
	api.KeysetState_PREPARED: runbook.Prepared, api.KeysetState_ACTIVE: runbook.Active, api.KeysetState_TAINTED: runbook.Tainted,
}

func fromProto(k *api.Keyset) runbook.Keyset {
	return runbook.Keyset{
		ID: k.GetId(), State: stateNames[k.GetState()], IssuedAt: fromProtoTime(k.GetIssuedAt()), ExpiresAt: fromProtoTime(k.GetExpiresAt()),
		X509AuthorityID: k.GetX509AuthorityId(), JWTKeyID: k.GetJwtKeyId(),
		SteppedDown: k.GetSteppedDownAt() != nil, TaintedAt: fromProtoTime(k.GetTaintedAt()),
		X509SVIDs: int(k.GetLiveX509Svids()), JWTExpiry: fromProtoTime(k.GetJwtLatestExpiry()),
		X509Safe: k.GetX509Safe(), JWTSafe: k.GetJwtSafe(),
	}
}

func fromProtoTime(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// Holders implements runbook.Backend.
func (b *backend) Holders(ctx context.Context, id string) ([]runbook.Holder, error) {
	resp, err := b.c.ListHolders(ctx, &api.ListHoldersRequest{Scope: b.scope, KeysetId: id})
	if err != nil {
		return nil, readError(err)
	}
	return holders(resp.GetHolders()), nil
}

func holders(list []*api.Holder) []runbook.Holder {
	var out []runbook.Holder
	for _, h := range list {
		out = append(out, runbook.Holder{
			Agent: h.GetAgentId(), Version: h.GetVersion(), Hostname: h.GetHostname(), Label: h.GetLabel(),
			SVIDs: int(h.GetSvids()), Streams: int(h.GetStreams()), Reason: h.GetReason(),
			LatestExpiry: fromProtoTime(h.GetLatestExpiry()), LastReport: fromProtoTime(h.GetLastReport()), BeginsAt: fromProtoTime(h.GetBeginsAt()), Rate: h.GetRate(),
		})
	}
	return out
}

// Prepare implements runbook.Backend.
func (b *backend) Prepare(ctx context.Context) (k runbook.Keyset, err error) {
	return k, mutate("", func(opt grpc.CallOption) error {
		resp, err := b.c.PrepareKeyset(ctx, &api.PrepareKeysetRequest{Scope: b.scope}, opt)
		if err == nil {
			k = fromProto(resp.GetKeyset())
		}
		return err
	})
}

// Activate implements runbook.Backend.
func (b *backend) Activate(ctx context.Context, id string) error {
	return mutate(id, func(opt grpc.CallOption) error {
		_, err := b.c.ActivateKeyset(ctx, &api.ActivateKeysetRequest{Scope: b.scope, KeysetId: id}, opt)
		return err
	})
}

// Taint implements runbook.Backend.
func (b *backend) Taint(ctx context.Context, id string) error {
	return mutate(id, func(opt grpc.CallOption) error {
		_, err := b.c.TaintKeyset(ctx, &api.TaintKeysetRequest{Scope: b.scope, KeysetId: id}, opt)
		return err
	})
}

// Remove implements runbook.Backend.
func (b *backend) Remove(ctx context.Context, id string, force bool) error {
	return mutate(id, func(opt grpc.CallOption) error {
		_, err := b.c.RemoveKeyset(ctx, &api.RemoveKeysetRequest{Scope: b.scope, KeysetId: id, Force: force}, opt)
		return err
	})
}

// plainError returns the server's message without gRPC's prefixes.
func plainError(err error) error { return errors.New(Reason(err)) }

// readError is plainError for a read: a [runbook.PermanentError] if the same call fails
// again.
func readError(err error) error {
	switch status.Code(err) {
	case codes.NotFound, codes.InvalidArgument, codes.PermissionDenied, codes.Unimplemented:
		return &runbook.PermanentError{Err: plainError(err)}
	}
	return plainError(err)
}

// mutate makes a mutating call once. Its error wraps [runbook.ErrOutcomeUnknown] unless
// the code or a missing connection shows that nothing was changed.
func mutate(id string, call func(grpc.CallOption) error) error {
	var reached peer.Peer // stays empty without a connection
	err := call(grpc.Peer(&reached))
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	switch st.Code() {
	case codes.FailedPrecondition:
		for _, d := range st.Details() {
			if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetReason() == api.ReasonNotSafe && info.GetDomain() == api.ErrorDomain {
				return &runbook.NotSafeError{Keyset: id, Message: st.Message()}
			}
		}
		return plainError(err)
	case codes.NotFound, codes.Aborted, codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
		return plainError(err)
	}
	if reached.Addr == nil {
		return fmt.Errorf("the server was not reached, nothing was changed: %s", Reason(err))
	}
	return fmt.Errorf("%w: %s", runbook.ErrOutcomeUnknown, Reason(err))
}
