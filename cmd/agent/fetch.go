package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/cli"
)

const defaultSocket = "/run/renewd/agent.sock"

// fetchedX509 is one X.509-SVID in the output of "fetch x509", without its key.
type fetchedX509 struct {
	SPIFFEID  string    `json:"spiffe_id"`
	Hint      string    `json:"hint,omitempty"`
	DNSNames  []string  `json:"dns_names,omitempty"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	Authority string    `json:"authority"`
	Serial    string    `json:"serial_number"`
}

// fetchedJWT is one JWT-SVID in the output of "fetch jwt".
type fetchedJWT struct {
	SPIFFEID  string     `json:"spiffe_id"`
	Hint      string     `json:"hint,omitempty"`
	Audience  []string   `json:"audience"`
	IssuedAt  *time.Time `json:"issued_at,omitempty"`
	ExpiresAt time.Time  `json:"expires_at"`
	KeyID     string     `json:"key_id"`
	Token     string     `json:"token"`
}

// fetcher is a call of "fetch x509" or "fetch jwt", with the flags that they share.
type fetcher struct {
	*cli.Call
	socket, dir string
	timeout     time.Duration
}

func newFetcher(call *cli.Call) *fetcher {
	f := &fetcher{Call: call}
	f.Flags.StringVar(&f.socket, "socket", defaultSocketPath(f.Getenv), "")
	f.Output()
	f.Flags.StringVar(&f.dir, "write", "", "")
	f.Flags.DurationVar(&f.timeout, "timeout", 5*time.Second, "")
	return f
}

// defaultSocketPath is the Workload API socket if no flag gives one.
func defaultSocketPath(getenv func(string) string) string {
	return cmp.Or(getenv("SPIFFE_ENDPOINT_SOCKET"), getenv("RENEWD_SOCKET_PATH"), defaultSocket)
}

// socketURL returns the gRPC target of a path. It returns a URL unchanged.
func socketURL(socket string) string {
	if strings.Contains(socket, ":") {
		return socket
	}
	if abs, err := filepath.Abs(socket); err == nil {
		socket = abs
	}
	return "unix://" + socket
}

// fetchX509Command is "fetch x509".
func fetchX509Command(ctx context.Context, call *cli.Call) error {
	f := newFetcher(call)
	if _, err := f.Parse(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	got, err := retryUnavailable(ctx, func() (*workloadapi.X509Context, error) {
		return workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(socketURL(f.socket)))
	})
	if err != nil {
		return fmt.Errorf("fetch X.509-SVIDs from %s: %w", f.socket, f.explain(err))
	}
	var out []fetchedX509
	for i, svid := range got.SVIDs {
		leaf := svid.Certificates[0]
		out = append(out, fetchedX509{
			SPIFFEID: svid.ID.String(), Hint: svid.Hint, DNSNames: leaf.DNSNames,
			NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter,
			Authority: authorityOf(svid.Certificates), Serial: leaf.SerialNumber.String(),
		})
		certs, key, err := svid.Marshal()
		if err != nil {
			return fmt.Errorf("encode %s: %w", svid.ID, err)
		}
		if err := f.writeFile(fmt.Sprintf("svid.%d.pem", i), 0o644, certs); err != nil {
			return err
		}
		if err := f.writeFile(fmt.Sprintf("svid.%d.key", i), 0o600, key); err != nil {
			return err
		}
	}
	for _, b := range got.Bundles.Bundles() {
		pem, err := b.Marshal()
		if err != nil {
			return fmt.Errorf("encode the bundle of %s: %w", b.TrustDomain(), err)
		}
		if err := f.writeFile("bundle."+b.TrustDomain().Name()+".pem", 0o644, pem); err != nil {
			return err
		}
	}
	if f.JSON() {
		return f.json(out)
	}
	now := time.Now()
	return f.printBlocks(len(out), func(w io.Writer, i int) {
		s := out[i]
		printPairs(w, "SPIFFE ID", s.SPIFFEID, "Hint", s.Hint, "DNS names", strings.Join(s.DNSNames, " "),
			"Valid from", cli.When(s.NotBefore, now), "Valid until", cli.When(s.NotAfter, now), "Authority", s.Authority, "Serial", s.Serial)
	})
}

// retryUnavailable calls fetch until it does not fail with Unavailable: an agent that is
// starting has no socket at first, and then no entries. When ctx ends it returns the
// last result.
func retryUnavailable[T any](ctx context.Context, fetch func() (T, error)) (T, error) {
	for {
		got, err := fetch()
		if status.Code(err) != codes.Unavailable {
			return got, err
		}
		select {
		case <-ctx.Done():
			return got, err
		case <-time.After(retryInterval):
		}
	}
}

// retryInterval is the time between two calls of an agent that is starting.
const retryInterval = 100 * time.Millisecond

// explain returns an error of the Workload API with its cause and remedy.
func (f *fetcher) explain(err error) error {
	st, _ := status.FromError(err)
	switch st.Code() {
	case codes.PermissionDenied:
		return fmt.Errorf("%s (%s): \"agent attest PID\" as root shows the selectors of a process; an entry takes effect some seconds after it was applied", st.Message(), st.Code())
	case codes.Unavailable, codes.DeadlineExceeded:
		if path, ok := strings.CutPrefix(socketURL(f.socket), "unix://"); ok {
			conn, dialErr := net.Dial("unix", path)
			if dialErr != nil {
				return fmt.Errorf("no agent answers: %w; start it, or give its socket with --socket or SPIFFE_ENDPOINT_SOCKET", dialErr)
			}
			_ = conn.Close()
		}
	}
	if st.Message() == "" {
		return err
	}
	return fmt.Errorf("%s (%s)", st.Message(), st.Code())
}

// json prints SVIDs as one object, like the other commands.
func (f *fetcher) json(svids any) error {
	return cli.PrintJSON(f.Stdout, map[string]any{"svids": svids})
}

// authorityOf returns the ID of the authority that signed a chain: the authority key
// identifier of its last certificate.
func authorityOf(chain []*x509.Certificate) string {
	return hex.EncodeToString(chain[len(chain)-1].AuthorityKeyId)
}

// fetchJWTCommand is "fetch jwt".
func fetchJWTCommand(ctx context.Context, call *cli.Call) error {
	f := newFetcher(call)
	audiences := f.Flags.String("audience", "", "")
	spiffeID := f.Flags.String("spiffe-id", "", "")
	if _, err := f.Parse(); err != nil {
		return err
	}
	audience := strings.FieldsFunc(*audiences, func(r rune) bool { return r == ',' })
	if len(audience) == 0 {
		return cli.Usagef("fetch jwt: give the audience with --audience")
	}
	params := jwtsvid.Params{Audience: audience[0], ExtraAudiences: audience[1:]}
	if *spiffeID != "" {
		id, err := spiffeid.FromString(*spiffeID)
		if err != nil {
			return cli.Usagef("fetch jwt: --spiffe-id: %v", err)
		}
		params.Subject = id
	}
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	svids, err := retryUnavailable(ctx, func() ([]*jwtsvid.SVID, error) {
		return workloadapi.FetchJWTSVIDs(ctx, params, workloadapi.WithAddr(socketURL(f.socket)))
	})
	if err != nil {
		return fmt.Errorf("fetch JWT-SVIDs from %s: %w", f.socket, f.explain(err))
	}
	var out []fetchedJWT
	for i, svid := range svids {
		s := fetchedJWT{
			SPIFFEID: svid.ID.String(), Hint: svid.Hint, Audience: svid.Audience,
			ExpiresAt: svid.Expiry, KeyID: keyID(svid.Marshal()), Token: svid.Marshal(),
		}
		if iat, ok := svid.Claims["iat"].(float64); ok {
			s.IssuedAt = unixTime(iat)
		}
		out = append(out, s)
		if err := f.writeFile(fmt.Sprintf("svid.%d.jwt", i), 0o600, []byte(s.Token)); err != nil {
			return err
		}
	}
	if f.JSON() {
		return f.json(out)
	}
	now := time.Now()
	return f.printBlocks(len(out), func(w io.Writer, i int) {
		s := out[i]
		issued := ""
		if s.IssuedAt != nil {
			issued = cli.When(*s.IssuedAt, now)
		}
		printPairs(w, "SPIFFE ID", s.SPIFFEID, "Hint", s.Hint, "Audience", strings.Join(s.Audience, ", "),
			"Issued at", issued, "Valid until", cli.When(s.ExpiresAt, now), "Authority", s.KeyID, "Token", s.Token)
	})
}

// keyID returns the kid of a parsed token.
func keyID(token string) string {
	encoded, _, _ := strings.Cut(token, ".")
	var header struct {
		KeyID string `json:"kid"`
	}
	raw, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil || json.Unmarshal(raw, &header) != nil {
		return ""
	}
	return header.KeyID
}

// writeFile writes one file if --write was given. The name consists of fixed text and
// the characters of a trust domain, so it cannot leave the directory.
func (f *fetcher) writeFile(name string, mode os.FileMode, data []byte) error {
	if f.dir == "" {
		return nil
	}
	if err := os.MkdirAll(f.dir, 0o755); err != nil {
		return fmt.Errorf("write the SVIDs: %w", err)
	}
	// Renamed from a temporary file: a reader never sees a part of it, and the mode is
	// right even if the file existed.
	tmp, err := os.CreateTemp(f.dir, "."+name+".*")
	if err != nil {
		return fmt.Errorf("write the SVIDs: %w", err)
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Chmod(mode)
	}
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), filepath.Join(f.dir, name))
	}
	if err != nil {
		return fmt.Errorf("write the SVIDs: %w", err)
	}
	return nil
}

// printBlocks prints n aligned blocks with an empty line between them.
func (f *fetcher) printBlocks(n int, block func(w io.Writer, i int)) error {
	for i := range n {
		if i > 0 {
			if err := cli.Printf(f.Stdout, "\n"); err != nil {
				return err
			}
		}
		table := cli.NewTable(f.Stdout)
		table.Whole = true // tokens are copied
		block(table, i)
		if err := cli.Flush(table); err != nil {
			return err
		}
	}
	return nil
}

// printPairs writes a "name: value" line for each value that is not empty.
func printPairs(w io.Writer, namesAndValues ...string) {
	for i := 0; i+1 < len(namesAndValues); i += 2 {
		if namesAndValues[i+1] != "" {
			_, _ = fmt.Fprintf(w, "%s:\t%s\n", namesAndValues[i], cli.Printable(namesAndValues[i+1]))
		}
	}
}
