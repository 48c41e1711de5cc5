package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
)

// maxAnswer is the size of an answer in bytes: the selectors of one process and the entries
// of one workload.
const maxAnswer = 16 << 20

// Ask has the agent at the admin socket attest a process.
func Ask(ctx context.Context, socket string, pid int) (*Attestation, error) {
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/attest?pid="+strconv.Itoa(pid), nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("admin socket %s: permission denied: run the command as root", socket)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("admin socket %s: no agent is listening: start it, or give its socket with --admin-socket", socket)
	case err != nil:
		return nil, fmt.Errorf("admin socket %s: %w", socket, err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("admin socket %s: %w", socket, err)
	case len(body) > maxAnswer:
		return nil, fmt.Errorf("admin socket %s: the answer has more than %d bytes", socket, maxAnswer)
	case resp.StatusCode != http.StatusOK:
		return nil, errors.New(strings.TrimSpace(string(body)))
	}
	var result Attestation
	if err := json.Unmarshal(body, &result); err != nil {
		return nil, fmt.Errorf("admin socket %s: %w", socket, err)
	}
	return &result, nil
}
