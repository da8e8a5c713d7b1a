package manager

import (
	"context"
	"sort"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

// ListEndpoints lists every endpoint by name.
func (m *Manager) ListEndpoints(context.Context, *pb.ListEndpointsRequest) (*pb.ListEndpointsResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	resp := &pb.ListEndpointsResponse{}
	for _, s := range m.mu.endpoints {
		resp.Endpoints = append(resp.Endpoints, s.status())
	}
	sort.Slice(resp.Endpoints, func(i, j int) bool { return resp.Endpoints[i].Name < resp.Endpoints[j].Name })
	return resp, nil
}

// StartEndpoint starts an endpoint and waits until it takes connections.
func (m *Manager) StartEndpoint(ctx context.Context, r *pb.EndpointRequest) (*pb.Endpoint, error) {
	s, err := m.find(r.Name)
	if err != nil {
		return nil, err
	}
	if len(r.ResetSettings) > 0 && s.status().State == stateRunning {
		return nil, rpc.Error(codes.FailedPrecondition, nil, "endpoint %s runs: ALTER SYSTEM RESET takes a setting back there", r.Name)
	}
	if err := m.want(ctx, r.Name, true); err != nil {
		return nil, err
	}
	s.start(r.ResetSettings...)
	if err := s.waitAWhile(ctx); err != nil {
		return nil, rpc.Error(codes.Unavailable, nil, "%v", err)
	}
	return s.status(), nil
}

// StopEndpoint shuts an endpoint's Postgres down and ends its agent.
func (m *Manager) StopEndpoint(ctx context.Context, r *pb.EndpointRequest) (*pb.Endpoint, error) {
	return m.endEndpoint(ctx, r.Name, (*supervisor).stop)
}

// KillEndpoint kills agent and Postgres and deletes the endpoint's local folder.
func (m *Manager) KillEndpoint(ctx context.Context, r *pb.EndpointRequest) (*pb.Endpoint, error) {
	return m.endEndpoint(ctx, r.Name, (*supervisor).kill)
}

func (m *Manager) endEndpoint(ctx context.Context, name string, end func(*supervisor, context.Context) error) (*pb.Endpoint, error) {
	s, err := m.find(name)
	if err != nil {
		return nil, err
	}
	if err := m.want(ctx, name, false); err != nil {
		return nil, err
	}
	if err := end(s, ctx); err != nil {
		return nil, err
	}
	return s.status(), nil
}

// Credentials opens the first password of the endpoint's superuser.
func (m *Manager) Credentials(ctx context.Context, r *pb.EndpointRequest) (*pb.CredentialsResponse, error) {
	s, err := m.find(r.Name)
	if err != nil {
		return nil, err
	}
	password, err := m.openPassword(ctx, s.doc.Project, s.doc.Branch)
	if err != nil {
		return nil, err
	}
	return &pb.CredentialsResponse{User: superuser, Password: password}, nil
}
