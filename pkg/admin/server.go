package admin

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// maxBody is the largest request in bytes.
const maxBody = 1 << 20

// failure is the JSON of an error.
type failure struct {
	Error struct {
		Kind    string `json:"kind"`
		Message string `json:"message"`
	} `json:"error"`
}

// status is the HTTP code of a kind, for tools that look at nothing else; the
// client reads the kind's name.
func status(k fault.Kind) int {
	switch k {
	case fault.Invalid, fault.OutOfRange:
		return http.StatusBadRequest
	case fault.NotFound:
		return http.StatusNotFound
	case fault.Exists, fault.InUse, fault.Pending, fault.Conflict:
		return http.StatusConflict
	case fault.Permission:
		return http.StatusForbidden
	case fault.Unsupported:
		return http.StatusNotImplemented
	case fault.Exhausted:
		return http.StatusInsufficientStorage
	case fault.Unavailable:
		return http.StatusServiceUnavailable
	case fault.Deadline:
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError
}

// Handler serves the operator's requests. cluster is nil without Kubernetes.
func Handler(m Manager, v Version, cluster Cluster) http.Handler {
	s := server{m: m, cluster: cluster, driver: v.Driver}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/version", answer(func(*http.Request) (any, error) { return v, nil }))
	mux.HandleFunc("GET /v1/domains", answer(s.domains))
	mux.HandleFunc("GET /v1/images", answer(func(r *http.Request) (any, error) { return s.images(r.Context()), nil }))
	mux.HandleFunc("GET /v1/chain", answer(s.chain))
	mux.HandleFunc("GET /v1/operations", answer(s.operations))
	mux.HandleFunc("GET /v1/usage", answer(s.usage))
	mux.HandleFunc("GET /v1/check", answer(func(r *http.Request) (any, error) {
		return s.check(r.Context(), r.URL.Query().Get("domain"))
	}))
	mux.HandleFunc("POST /v1/fix", answer(s.fix))
	mux.HandleFunc("POST /v1/import", answer(s.imports))
	mux.HandleFunc("/", answer(func(r *http.Request) (any, error) {
		return nil, fault.New(fault.Unsupported, "quarry %s does not know %s %s", v.Version, r.Method, r.URL.Path)
	}))
	return mux
}

// answer turns a function into a handler that writes JSON.
func answer(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		out, err := f(r)
		code := http.StatusOK
		if err != nil {
			kind := fault.KindOf(err)
			var fail failure
			fail.Error.Kind, fail.Error.Message = kind.String(), err.Error()
			out, code = fail, status(kind)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		if err := json.NewEncoder(w).Encode(out); err != nil {
			klog.FromContext(r.Context()).V(2).Info("The operator went away before the answer", "path", r.URL.Path, "err", err)
		}
	}
}

type server struct {
	m       Manager
	cluster Cluster
	driver  string
}

func (s server) domains(r *http.Request) (any, error) {
	out := []Domain{}
	for _, d := range s.m.Domains(r.Context()) {
		out = append(out, domainOf(d))
	}
	slices.SortFunc(out, func(a, b Domain) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out, nil
}

func (s server) images(ctx context.Context) []Image {
	out := []Image{}
	for _, i := range s.m.All(ctx) {
		out = append(out, imageOf(i))
	}
	slices.SortFunc(out, func(a, b Image) int { return strings.Compare(a.Handle, b.Handle) })
	return out
}

func (s server) chain(r *http.Request) (any, error) {
	images := s.images(r.Context())
	of, err := find(images, r.URL.Query().Get("image"))
	if err != nil {
		return nil, err
	}
	return chainOf(images, of), nil
}

func (s server) operations(*http.Request) (any, error) {
	out := []Operation{}
	for _, o := range s.m.Operations() {
		out = append(out, operationOf(o))
	}
	slices.SortFunc(out, func(a, b Operation) int {
		if c := a.Started.Compare(b.Started); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out, nil
}

// findings checks the named domain, or all of them.
func (s server) findings(ctx context.Context, domain string) ([]image.Finding, map[string]string, error) {
	var found []image.Finding
	unchecked := map[string]string{}
	var names []string
	matched := false
	domains := s.m.Domains(ctx)
	for _, d := range domains {
		names = append(names, d.Config.Name)
		if domain != "" && domain != d.ID && domain != d.Config.Name && !slices.Contains(d.Config.Aliases, domain) {
			continue
		}
		matched = true
		key := d.ID
		if key == "" {
			key = d.Config.Name
		}
		if !d.Open {
			unchecked[key] = "it is not open: " + d.Problem
			continue
		}
		f, err := s.m.Check(ctx, d.ID)
		if err != nil {
			unchecked[key] = err.Error()
			continue
		}
		found = append(found, f...)
	}
	if domain != "" && !matched {
		return nil, nil, fault.New(fault.NotFound, "domain %q is not configured: there are %s", domain, strings.Join(names, ", "))
	}
	if s.cluster != nil {
		f, err := s.strangers(ctx, domains, domain)
		if err != nil {
			unchecked[Kubernetes] = err.Error()
		}
		found = append(found, f...)
	}
	slices.SortFunc(found, func(a, b image.Finding) int {
		return strings.Compare(a.Domain+"/"+a.Object+"/"+a.ID, b.Domain+"/"+b.Object+"/"+b.ID)
	})
	return found, unchecked, nil
}

func (s server) check(ctx context.Context, domain string) (any, error) {
	found, unchecked, err := s.findings(ctx, domain)
	if err != nil {
		return nil, err
	}
	out := Checked{Findings: []Finding{}, Unchecked: unchecked}
	for _, f := range found {
		out.Findings = append(out.Findings, findingOf(f))
	}
	return out, nil
}

// body reads a request: an unknown restriction must not widen what is done.
func body[T any](r *http.Request) (req T, err error) {
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&req); err != nil {
		return req, fault.New(fault.Invalid, "%s: %w", r.URL.Path, err)
	}
	return req, nil
}

func (s server) imports(r *http.Request) (any, error) {
	req, err := body[ImportRequest](r)
	if err != nil {
		return nil, err
	}
	img, err := s.m.Import(r.Context(), image.ImportRequest{Name: req.Name, Domain: req.Domain, Source: req.Source, Block: req.Block, Filesystem: req.Filesystem,
		Described: image.Described{Namespace: req.Namespace, Claim: req.Claim, Volume: req.Name}, DryRun: req.DryRun})
	if err != nil {
		return nil, err
	}
	node, err := s.m.Topology(img.Handle.Domain)
	return Imported{Image: imageOf(img), Driver: s.driver, Node: node, DryRun: req.DryRun}, err
}

func (s server) fix(r *http.Request) (any, error) {
	req, err := body[FixRequest](r)
	if err != nil {
		return nil, err
	}
	found, unchecked, err := s.findings(r.Context(), req.Domain)
	if err != nil {
		return nil, err
	}
	out := FixResult{Applied: req.Apply, Results: []Fixed{}, Unchecked: unchecked}
	stands := map[string]bool{}
	for _, f := range found {
		stands[f.ID] = true
		if len(req.IDs) > 0 && !slices.Contains(req.IDs, f.ID) || len(req.Kinds) > 0 && !slices.Contains(req.Kinds, string(f.Kind)) {
			continue
		}
		fixed := Fixed{Finding: findingOf(f)}
		switch {
		case f.Fix == "":
			fixed.Error = "only a person can help here"
		case req.Apply:
			done, err := s.m.Fix(r.Context(), f)
			if err != nil {
				fixed.Error = err.Error()
			}
			fixed.Done = done
		}
		out.Results = append(out.Results, fixed)
	}
	for _, id := range req.IDs {
		if !stands[id] {
			out.Results = append(out.Results, Fixed{Finding: Finding{ID: id}, Error: "no such finding stands (any more)"})
		}
	}
	return out, nil
}

// Serve answers on l until ctx ends, then lets what is being answered finish
// for at most grace. It closes l.
func Serve(ctx context.Context, l net.Listener, h http.Handler, grace time.Duration) error {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	select {
	case err := <-ended:
		return fault.Wrap(fault.Internal, err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	err := srv.Shutdown(stop)
	if err != nil {
		err = errors.Join(err, srv.Close())
	}
	if served := <-ended; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fault.New(fault.Deadline, "requests on %s were still being answered after %s", l.Addr(), grace)
	}
	return err
}
